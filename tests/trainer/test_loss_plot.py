import pytest

from graft.trainer.loss_plot import averaged_losses, loss_curves, plot_losses


def test_losses_are_drawn_without_a_display(tmp_path):
    history = [{"step": s, "loss": 2 / s, "learning_rate": 0.1} for s in range(1, 5)]
    history += [{"step": 4, "eval_full_loss": 0.6, "eval_full_rouge1": 3.0}, {"step": 4, "eval_truncated_loss": 0.7}]
    plot_losses(history, tmp_path / "loss.png", 4)
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in tmp_path.iterdir()] == ["loss.png"]
    plot_losses([], tmp_path / "nothing.png")
    assert not (tmp_path / "nothing.png").exists()


def test_a_final_evaluation_at_the_last_step_stands_beside_the_curve_of_those_while_training():
    history = [{"step": step, "loss": 2 / step, "eval_full_loss": 3 / step} for step in (1, 2)]
    history.append({"step": 2, "eval_full_loss": 4.0})  # of all rows
    curves = loss_curves(history)
    assert curves == {"train": [(1, 2.0), (2, 1.0)], "eval full": [(1, 3.0), (2, 1.5)], "eval full, final": [(2, 4.0)]}


def test_training_losses_are_averaged_over_logs_or_epochs(tmp_path):
    history = [{"step": 2 * n, "loss": float(n), "epoch": n / 2} for n in range(1, 6)]
    assert averaged_losses(history, 2) == ("train, mean of 2 logs", [(3, 1.5), (7, 3.5), (10, 5.0)])
    assert averaged_losses(history, "epoch") == ("train, mean of each epoch", [(3, 1.5), (7, 3.5), (10, 5.0)])
    plot_losses(history, tmp_path / "mean.png", average="epoch")
    assert (tmp_path / "mean.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="`average` must be at least 1, .* got 0"):
        plot_losses(history, tmp_path / "none.png", average=0)


def test_views_that_agree_are_all_seen(tmp_path):
    from matplotlib.colors import to_rgb
    from matplotlib.image import imread

    history = [{"step": step, "loss": 1.0} for step in (0, 100)]
    history += [
        {"step": step, **{f"eval_{view}_loss": 3 - step / 50 for view in ("retrieved", "without", "random")}}
        for step in range(0, 101, 2)
    ]
    plot_losses(history, tmp_path / "loss.png")
    lines = imread(tmp_path / "loss.png")[:, :500, :3]  # without the legend, which stands at the right
    for colour in ("tab:orange", "tab:green", "tab:red"):
        assert (abs(lines - to_rgb(colour)).max(-1) < 0.1).sum() > 50
