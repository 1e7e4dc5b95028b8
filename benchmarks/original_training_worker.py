"""Steps of training by the original Unlimiformer in its own environment; training_throughput.py asks for them.

Runs under a transformers that the original starts under (4.46 here), so it imports neither graft nor what
came after. Each line read is a regime; each line written the seconds of a step's parts and the loss before it.
"""

import argparse
import json
import sys
import time

import transformers.utils.import_utils

transformers.utils.import_utils._datasets_available = False  # those of a newer environment would not import
transformers.utils.import_utils._peft_available = False

import torch  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from transformers import BartConfig, BartForConditionalGeneration  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--original", required=True)
    parser.add_argument("--config", required=True, help="JSON of BartConfig's arguments")
    parser.add_argument("--rows", required=True, help="safetensors of ids and labels, `batch` for each step")
    parser.add_argument("--batch", type=int, required=True)
    parser.add_argument("--threads", type=int, required=True)
    arguments = parser.parse_args()
    sys.path.insert(0, f"{arguments.original}/src")
    from random_training_unlimiformer import RandomTrainingUnlimiformer
    from unlimiformer import Unlimiformer

    torch.set_num_threads(arguments.threads)
    rows = {name: ids.split(arguments.batch) for name, ids in load_file(arguments.rows).items()}
    for line in sys.stdin:
        torch.manual_seed(0)
        # Its hooks take the keyword arguments of the eager attention only.
        model = BartForConditionalGeneration(BartConfig(**json.loads(arguments.config), attn_implementation="eager"))
        chosen = {"random": RandomTrainingUnlimiformer, "retrieval": Unlimiformer}[line.strip()]
        chosen.convert_model(
            model, layer_begin=0, chunk_overlap=0.5, unlimiformer_training=line.strip() == "retrieval"
        )
        optimizer = torch.optim.AdamW(model.parameters(), lr=5e-5, weight_decay=0.0)
        losses = []
        for ids, labels in zip(rows["input_ids"], rows["labels"], strict=True):
            began = time.perf_counter()
            model.train()
            loss = model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels).loss
            losses.append(float(loss))
            forward = time.perf_counter()
            loss.backward()
            backward = time.perf_counter()
            optimizer.step()
            optimizer.zero_grad()
            end = time.perf_counter()
        parts = {"step": end - began, "forward": forward - began, "backward": backward - forward}
        print(json.dumps({**parts, "optimizer": end - backward, "first loss": losses[0]}), flush=True)


if __name__ == "__main__":
    main()
