"""PNA attention layers, both forms: ours, the same with all weights kept, stock attention, and the original, in turn.

python benchmarks/pna_attention.py --tokens 256 1024 4096
python benchmarks/pna_attention.py --original PATH/src --original-python ENV/bin/python --tokens 256 1024

As gin_attention.py, whose header says what is needed. The original's largest value is each token's own, so its numbers
differ from ours, and only the form that keeps all weights is compared. It holds tokens x tokens x width numbers for
every head.
"""

import sys

from attention_cases import measure, parse


def main(argv=None) -> int:
    return measure("pna_attention", parse(argv, __doc__, ["pna", "pna_vector"], ["none", "relu"], 1.0))


if __name__ == "__main__":
    sys.exit(main())
