"""Train from the start, from the newest complete checkpoint, or not at all if that was done before the run stopped."""

from __future__ import annotations

import logging
import math
import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from graft.trainer.callbacks import output_folder
from graft.trainer.checkpoints import last_complete_checkpoint
from graft.trainer.run_record import write_record
from graft.trainer.trainer import GraftSeq2SeqTrainer

logger = logging.getLogger(__name__)


class EndsWhenTold(TrainerCallback):
    """SIGTERM, sent before a machine is taken away, ends training behind the step it came in, with a checkpoint.

    The stock's `enable_jit_checkpoint` saves in the middle of a step, whose random draws are then made twice: a run
    that goes on from there is another one. And it forgets that it did.
    """

    told = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Signals are heard inside; only a process's main thread has handlers of them."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = signal.signal(signal.SIGTERM, self._tell)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)

    def _tell(self, *_: Any) -> None:
        logger.info("SIGTERM: this step is finished and saved.")
        self.told = True

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Save and stop, if any process was told."""
        if args.world_size > 1:
            self.told = _any_process(self.told, args.device)
        if self.told:
            control.should_save = control.should_training_stop = True

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """The stock ends the epoch too, which is not over."""
        if self.told:
            control.should_log = control.should_evaluate = control.should_save = False


def _any_process(told: bool, device: torch.device) -> bool:
    """Whether one was told: the signal reaches them in different steps, and one that went on would wait for ever."""
    number = torch.tensor(int(told), device=device)
    torch.distributed.all_reduce(number, torch.distributed.ReduceOp.MAX)
    return bool(number)


def train_or_go_on(trainer: GraftSeq2SeqTrainer, record: dict[str, Any], before: Mapping[str, Any]) -> bool:
    """Train, from the newest complete checkpoint if there is one; False if a signal stopped it half-way.

    A run that was trained to its end before it stopped is not trained again: the stock would add a step.
    """
    if not trainer.args.do_train:
        return True
    output, ends = output_folder(trainer.args), EndsWhenTold()
    if before.get("status") in ("trained", "complete") and _same_training(before, record):
        logger.info("%s has been trained already; its weights are evaluated.", output)
        trainer._load_from_checkpoint(str(output))
        _take_state(trainer, output)
        record |= {"training": before["training"], "status": "trained"}
        return True
    checkpoint = last_complete_checkpoint(output)
    if checkpoint is not None:
        logger.info("Going on from %s.", checkpoint)
    if checkpoint is not None and int(checkpoint.name.rpartition("-")[2]) >= planned_steps(trainer):
        trainer._load_from_checkpoint(str(checkpoint))
        _take_state(trainer, checkpoint)
        if trainer.args.load_best_model_at_end and trainer.state.best_model_checkpoint:
            trainer._load_best_model()
    else:
        trainer.add_callback(ends)
        with ends.listening():
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    record["training"] = {
        "steps": trainer.state.global_step,
        "resumed_from": checkpoint.name if checkpoint is not None else None,
        "best_metric": trainer.state.best_metric,
        "best_step": trainer.state.best_global_step,
        "tokens_seen": trainer.state.num_input_tokens_seen,
    }
    if ends.told:
        return False
    trainer.save_model(_internal_call=True)  # otherwise the stock pushes it, before it is evaluated
    trainer.save_state()
    record["status"] = "trained"
    write_record(trainer.args, record)
    return True


def _same_training(before: Mapping[str, Any], record: Mapping[str, Any]) -> bool:
    """Whether both runs train alike; where they write may differ, since folders are moved."""
    one, other = ({**run["configuration"]["training"], "output_dir": None} for run in (before, record))
    return one == other


def _take_state(trainer: GraftSeq2SeqTrainer, folder: Path) -> None:
    state = TrainerState.load_from_json(str(folder / "trainer_state.json"))
    state.is_local_process_zero, state.is_world_process_zero = (
        trainer.state.is_local_process_zero,
        trainer.state.is_world_process_zero,
    )
    trainer.state = state


def planned_steps(trainer: GraftSeq2SeqTrainer) -> int:
    """Optimizer steps of the whole run, counted as the stock does."""
    args = trainer.args
    if args.max_steps > 0:
        return args.max_steps
    steps_per_epoch = max(math.ceil(len(trainer.get_train_dataloader()) / args.gradient_accumulation_steps), 1)
    return math.ceil(args.num_train_epochs * steps_per_epoch)
