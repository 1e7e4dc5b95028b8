"""Trainers that evaluate every row once, in order, with its abilities, and write nothing that executes on loading.

As few lines over the stock ones as that needs; each override says why the stock's will not do.
"""

from __future__ import annotations

import inspect
import logging
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, SequentialSampler
from transformers import Seq2SeqTrainer, Trainer
from transformers.trainer_utils import EvalLoopOutput, PredictionOutput

from graft.trainer.abilities import (
    Ability,
    ChoosesDecay,
    DescribesRows,
    Part,
    Read,
    ReadsInTraining,
    ViewsRows,
    base_model,
    plain_reading,
    read_plainly,
)
from graft.trainer.arguments import LIKELIHOOD_VIEWS
from graft.trainer.evaluation import Evaluation
from graft.trainer.metrics import Metric
from graft.trainer.published_files import check_hub_strategy
from graft.trainer.publishing import PublishesFiles
from graft.trainer.token_losses import IGNORED, in_rows, scored_tail, token_losses, until_end

logger = logging.getLogger(__name__)

ROW_COLUMNS = ("id", "references", "source_tokens", "truncated", "scored_bytes")
BATCH_COLUMNS = ("prompt_ids", "prompt_mask")


class GraftTrainerMixin(PublishesFiles):
    """What `GraftTrainer` and `GraftSeq2SeqTrainer` add to the stock trainers.

    Args:
        model, args: as in the stock; further positional and keyword arguments go there too.
        abilities: used while evaluating; the first that has a way to read a view reads it.
        metrics: functions of (predictions, references) on decoded text; they need `args.predict_with_generate`.
        generation: fields of `GenerationConfig` for every `generate` of an evaluation.
        eval_collator: makes evaluation batches, where they differ from those of training.

    Raises:
        ValueError: `compute_metrics` is given, or `args.hub_strategy` would publish pickles.
    """

    data_collator: Any

    def __init__(
        self,
        model: Any = None,
        args: Any = None,
        *rest: Any,
        abilities: Sequence[Ability] = (),
        metrics: Sequence[Metric] = (),
        generation: Mapping[str, Any] | None = None,
        eval_collator: Any = None,
        **kwargs: Any,
    ) -> None:
        if kwargs.get("compute_metrics") is not None:
            raise ValueError("`compute_metrics` would not be called; give `metrics`, functions of decoded texts.")
        check_hub_strategy(args)
        super().__init__(model, args, *rest, **kwargs)
        self.abilities, self.metrics = list(abilities), list(metrics)
        self.generation, self.eval_collator = dict(generation or {}), eval_collator
        self.evaluations: dict[str, Evaluation] = {}
        self.card: dict[str, Any] = {}
        # `compute_loss` below divides by the tokens of the whole batch, whatever the model's own loss does with them.
        self.model_accepts_loss_kwargs = True
        self._loss_shifts_labels = not self._encoder_decoder
        self._reading: list[Read] = [read_plainly]
        self._evaluated: Any = None
        self._view: str | None = None
        self._given: dict[str, Any] = {}

    @property
    def _encoder_decoder(self) -> bool:
        return bool(getattr(base_model(self.model).config, "is_encoder_decoder", False))

    @property
    def _generates(self) -> bool:
        return getattr(self.args, "predict_with_generate", False) and self._view not in LIKELIHOOD_VIEWS

    # Batches ---------------------------------------------------------------------------------------------------------

    def _get_eval_sampler(self, eval_dataset: Any) -> Any:
        """Rows in their order. The stock groups evaluation by length as soon as training does."""
        return SequentialSampler(eval_dataset) if hasattr(eval_dataset, "__len__") else None

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        wanted = [*BATCH_COLUMNS, *(column for ability in self.abilities for column in ability.columns)]
        self._signature_columns += [name for name in wanted if name not in self._signature_columns]

    def _get_dataloader(
        self,
        dataset: Any,
        description: str,
        batch_size: int,
        sampler_fn: Any = None,
        is_training: bool = False,
        dataloader_key: str | None = None,
    ) -> DataLoader[Any]:
        """Evaluation may have its own collator, and a view its own rows; the stock knows one for everything."""
        collator = self.data_collator
        for ability in self.abilities:
            if not is_training and self._view is not None and isinstance(ability, ViewsRows):
                dataset = ability.viewed_rows(dataset, self._view)
        try:
            if self.eval_collator is not None and not is_training:
                self.data_collator = self.eval_collator
            return super()._get_dataloader(dataset, description, batch_size, sampler_fn, is_training, dataloader_key)
        finally:
            self.data_collator = collator

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """As the stock, unless an ability knows better; in the order of the model, the same in every process."""
        for ability in self.abilities:
            if isinstance(ability, ChoosesDecay):
                return ability.decayed_parameters(model)
        names: list[str] = super().get_decay_parameter_names(model)
        return names

    # Loss ------------------------------------------------------------------------------------------------------------

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Sum over the tokens here, divided by the tokens of the whole (accumulated, distributed) batch.

        The stock leaves the division to the model; BART's loss ignores it, so accumulating gradients would differ
        from a larger batch.
        """
        inputs = dict(inputs)
        with ExitStack() as stack:
            for ability in self.abilities:
                inputs |= ability.training_kwargs(self.state)
                if isinstance(ability, ReadsInTraining):
                    inputs = stack.enter_context(ability.training_inputs(self.model, inputs, self.state))
            outputs = model(**inputs)
        loss = outputs["loss"]
        if self.label_smoother is not None:
            loss = self.label_smoother(outputs, inputs["labels"], shift_labels=not self._encoder_decoder)
        if num_items_in_batch is not None:
            labels = inputs["labels"] if self._encoder_decoder else inputs["labels"][:, 1:]
            loss = loss * (labels != IGNORED).sum() / num_items_in_batch
            if self.args.average_tokens_across_devices:  # gradients are averaged over processes afterwards
                loss = loss * self.accelerator.num_processes
        return (loss, outputs) if return_outputs else loss

    # Evaluation ------------------------------------------------------------------------------------------------------

    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
        **generation: Any,
    ) -> dict[str, float]:
        """Evaluate rows, or each view of a dictionary of views; keys are `eval_loss`, or `eval_<view>_loss`, ..."""
        chosen = self.eval_dataset if eval_dataset is None else eval_dataset
        if isinstance(chosen, dict):
            metrics: dict[str, float] = {}
            for view in chosen:
                rows = view if eval_dataset is None else chosen[view]
                metrics |= self._evaluate_view(view, rows, ignore_keys, f"{metric_key_prefix}_{view}", generation)
            return metrics
        view = chosen if isinstance(chosen, str) else None
        return self._evaluate_view(view, eval_dataset, ignore_keys, metric_key_prefix, generation)

    def _evaluate_view(
        self,
        view: str | None,
        rows: Any,
        ignore_keys: list[str] | None,
        prefix: str,
        generation: dict[str, Any],
    ) -> dict[str, float]:
        named: Any = self.eval_dataset if rows is None or isinstance(rows, str) else rows
        self._evaluated = named[rows] if isinstance(rows, str) else named
        self._view, self._given = view, generation
        try:
            return super().evaluate(rows, ignore_keys=ignore_keys, metric_key_prefix=prefix)
        finally:
            self._evaluated, self._view, self._given = None, None, {}

    def predict(
        self,
        test_dataset: Any,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "test",
        view: str | None = None,
        **generation: Any,
    ) -> PredictionOutput:
        """Predict rows, as `view` says; targets, where the rows have them, are scored as in `evaluate`."""
        self._evaluated, self._view, self._given = test_dataset, view, generation
        try:
            return super().predict(test_dataset, ignore_keys=ignore_keys, metric_key_prefix=metric_key_prefix)
        finally:
            self._evaluated, self._view, self._given = None, None, {}

    def evaluation_loop(
        self,
        dataloader: DataLoader[Any],
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """The stock's loop inside the abilities' contexts, with each row once and metrics from whole columns.

        The stock Seq2Seq class gathers with `gather`, which keeps the rows that fill up the last batch.
        """
        self.gather_function = self.accelerator.gather_for_metrics
        with ExitStack() as stack:
            entered = [stack.enter_context(a.evaluating(self.model, self._view)) for a in self.abilities]
            self._reading = [next((read for read in entered if read is not None), plain_reading(self.model))]
            try:
                output = super().evaluation_loop(dataloader, description, False, ignore_keys, metric_key_prefix)
            finally:
                self._reading = [read_plainly]
        evaluation = self._as_evaluation(output, metric_key_prefix)
        evaluation.score(self.metrics, by_position=not self._encoder_decoder)
        self.evaluations[metric_key_prefix] = evaluation
        if self.is_world_process_zero():
            step = f"-step-{self.state.global_step:06d}" if description == "Evaluation" else ""
            evaluation.write(Path(self.args.output_dir) / "predictions" / f"{metric_key_prefix}{step}.jsonl")
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in evaluation.values.items()}
        columns = output.predictions
        return EvalLoopOutput(
            columns.get("generated", columns.get("losses")), None, {**output.metrics, **metrics}, output.num_samples
        )

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
        **_: Any,
    ) -> tuple[Any, Any, Any]:
        """Loss of every target token and generated tokens of every row, as columns (rows, ...) padded with -100.

        The stock returns the batch's mean loss, whose mean depends on the batch size, and generates from a causal
        model's prompt and answer together.
        """
        started = time.perf_counter()
        inputs = self._prepare_inputs(inputs)
        rows = len(inputs["input_ids"])
        losses, generated = [], []
        with torch.no_grad(), self.compute_loss_context_manager():
            for part in self._reading[0](inputs):
                if part.labels is not None:
                    losses.append((part.rows, self._part_losses(model, part)))
                if self._generates and part.prompt_inputs is not None:
                    generated.append((part.rows, self._generate(part)))
        columns = {}
        if losses:
            columns["losses"] = in_rows(losses, rows)
        if generated:
            columns["generated"] = in_rows(generated, rows)
        share = (time.perf_counter() - started) / rows
        columns["seconds"] = torch.full((rows,), share, device=inputs["input_ids"].device)
        return None, columns, None

    def _part_losses(self, model: nn.Module, part: Part) -> Tensor:
        assert part.labels is not None
        if self._encoder_decoder:
            logits = model(**part.loss_inputs, labels=part.labels)["logits"]
            return token_losses(logits, part.labels, shifted=False)
        kept: dict[str, Any] = {}
        if _takes(base_model(self.model), "logits_to_keep"):  # those of a long document that nobody scores would
            kept["logits_to_keep"] = scored_tail(part.labels)  # take most of the memory
        if set(part.loss_inputs) == {"input_ids", "attention_mask"}:
            # Left padding must not count; and with positions given, a model with its own memory reads without it.
            kept["position_ids"] = (part.loss_inputs["attention_mask"].cumsum(dim=1) - 1).clamp(min=0)
        logits = model(**part.loss_inputs, **kept)["logits"]
        return token_losses(logits, part.labels, shifted=True)

    def _generate(self, part: Part) -> Tensor:
        """New tokens only, (rows, longest), -100 from the first token after the end on."""
        assert part.prompt_inputs is not None
        stock = {"max_length": "generation_max_length", "num_beams": "generation_num_beams"}
        named = {name: getattr(self.args, field, None) for name, field in stock.items()}
        options = {name: value for name, value in named.items() if value is not None} | self.generation | self._given
        model: Any = self.model
        sequences = model.generate(**part.prompt_inputs, **options)
        prompt = 1 if self._encoder_decoder else part.prompt_inputs["input_ids"].shape[1]
        return until_end(sequences[:, prompt:], options.get("eos_token_id", model.generation_config.eos_token_id))

    def _as_evaluation(self, output: EvalLoopOutput, name: str) -> Evaluation:
        columns: Any = output.predictions
        rows = {column: _column(self._evaluated, column) for column in ROW_COLUMNS}
        known = {column: values for column, values in rows.items() if values is not None}
        for ability in self.abilities:
            if isinstance(ability, DescribesRows):
                known = ability.row_facts(self._evaluated, self.processing_class) | known
        seconds = [float(value) for value in columns["seconds"]]
        if len(seconds) != output.num_samples:
            raise RuntimeError(f"{output.num_samples} rows were evaluated, {len(seconds)} came back.")
        predictions = generated_tokens = None
        if "generated" in columns:
            tokens = [row[row != IGNORED] for row in columns["generated"]]
            tokenizer: Any = self.processing_class
            predictions = [tokenizer.decode(row, skip_special_tokens=True).strip() for row in tokens]
            generated_tokens = [len(row) for row in tokens]
        return Evaluation(name, known, columns.get("losses"), predictions, generated_tokens, seconds)


class GraftTrainer(GraftTrainerMixin, Trainer):
    """`Trainer` with abilities and honest evaluation; see `GraftTrainerMixin`."""


class GraftSeq2SeqTrainer(GraftTrainerMixin, Seq2SeqTrainer):
    """`Seq2SeqTrainer` with abilities and honest evaluation; see `GraftTrainerMixin`."""


def _column(rows: Any, name: str) -> list[Any] | None:
    """A column of a Dataset or of a list of dictionaries, None where it has none."""
    if hasattr(rows, "column_names"):
        return list(rows[name]) if name in rows.column_names else None
    if not len(rows) or name not in rows[0]:
        return None
    return [row[name] for row in rows]


def _takes(model: nn.Module, name: str) -> bool:
    """Whether the forward of the model's class, or of one it passes its keywords on to, has such an argument."""
    forwards = [parent.forward for parent in type(model).__mro__ if issubclass(parent, nn.Module)]
    return any(name in inspect.signature(forward).parameters for forward in forwards)
