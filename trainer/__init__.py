"""How graft learns: arguments, data, trainers, metrics and the model card."""
