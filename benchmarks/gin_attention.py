"""A GIN attention layer: ours, the same with all weights kept, stock attention, and the original, in turn.

python benchmarks/gin_attention.py --tokens 256 1024 4096
python benchmarks/gin_attention.py --original PATH/src --original-python ENV/bin/python

560 wide, 8 heads, random weights, float32. Without a transform ours is one fused call; with one it works in blocks of
rows. PATH/src holds the original's package xgpt, of lamm-mit/Graph-Aware-Transformers; its environment needs
transformers 4.46.3. Before anything is timed, ours, the form that keeps all and the original must give the same
numbers. Ratios are theirs / ours of the same round: above 1, ours is faster.
"""

import sys

from attention_cases import measure, parse


def main(argv=None) -> int:
    return measure("gin_attention", parse(argv, __doc__, ["gin"], ["none", "relu", "silu"], 0.5))


if __name__ == "__main__":
    sys.exit(main())
