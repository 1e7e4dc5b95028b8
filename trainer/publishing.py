"""What a Trainer saves and publishes: no pickle that nothing reads back, and nothing that is not on the list."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from transformers.utils.hub import PushInProgress

from graft.trainer.configuration_error import ConfigurationError
from graft.trainer.model_card import facts_of_trainer, write_model_card
from graft.trainer.published_files import collect_checkpoint, publish, without_pickled_arguments

if TYPE_CHECKING:  # one of two trainers, whose signatures differ; Any says so
    from typing import Any as _Base
else:
    _Base = object


class PublishesFiles(_Base):
    """The part of `GraftTrainerMixin` that writes folders and pushes them."""

    push_in_progress: Any

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """As the stock, but the arguments as JSON without tokens in place of a pickle that nothing reads back."""
        super()._save(output_dir, state_dict)
        if self.args.should_save:
            folder = Path(output_dir or self.args.output_dir or ".")
            without_pickled_arguments(folder, self.args)
            for ability in self.abilities:
                ability.save(folder)

    def init_hf_repo(self, *args: Any, **kwargs: Any) -> None:
        """As the stock, before the first step; without a network or a right there is one error in place of many lines.

        Raises:
            ConfigurationError: the repository cannot be made.
        """
        try:
            super().init_hf_repo(*args, **kwargs)
        except Exception as error:  # no network, no right: no common class
            name = self.args.hub_model_id or Path(self.args.output_dir or ".").name
            reason = " ".join(str(error).split())
            raise ConfigurationError(
                f"`training.push_to_hub`: the repository {name!r} cannot be made: {reason} Log in with `hf auth "
                "login` or set HF_TOKEN; without a network leave it out, and push the folder later."
            ) from error

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """As the stock, but with the .py files an auto_map points at, and without any pickle."""
        if not self.is_world_process_zero() or self.args.hub_strategy == "end":
            return
        in_progress = self.push_in_progress
        if not self.args.hub_always_push and in_progress is not None and not in_progress.is_done():
            return
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        output = Path(self.args.output_dir or ".")
        collect_checkpoint(Path(checkpoint_folder), output)
        message = f"Training in progress, step {self.state.global_step}"
        where = {"token": self.args.hub_token, "revision": self.args.hub_revision}
        job = publish(output, self.hub_model_id, message, blocking=False, **where)
        if in_progress is None or in_progress.is_done():
            self.push_in_progress = PushInProgress(cast(Any, [job]))
        else:
            in_progress.jobs.append(job)

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """As the stock, but by the same list of what may leave this machine: no predictions, no pickles."""
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        token = token or self.args.hub_token
        if self.hub_model_id is None:
            self.init_hf_repo(token=token, private=private)
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        self.create_model_card(**kwargs)
        self._finish_current_push()
        where = {"token": token, "revision": revision or self.args.hub_revision}
        output = Path(self.args.output_dir or ".")
        return publish(output, self.hub_model_id, commit_message or "End of training", blocking, **where)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Ours: results with intervals, a snippet that runs, what the abilities are (see `model_card.py`)."""
        if self.is_world_process_zero():
            write_model_card(Path(self.args.output_dir or "."), facts_of_trainer(self, *args, **kwargs))
