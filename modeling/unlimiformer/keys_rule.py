"""How many keys a query keeps, in numbers and in the words of a handle: "exact", or "keys k of n"."""

from ...configuration.configuration_unlimiformer import UnlimiformerConfig


def keys_per_query(config: UnlimiformerConfig, window: int) -> int | None:
    """How many keys each query keeps: `keys_per_query` with "window" spelt out; None for all."""
    return window if config.keys_per_query == "window" else config.keys_per_query


def keys_rule(config: UnlimiformerConfig, window: int, source: int | None = None) -> str:
    """ "exact" where every query of the layers in range sees every key of `source`, else "keys k of n" and more."""
    kept = keys_per_query(config, window)
    limits = [
        ("first window hidden", config.exclude_window and (source is None or source > window)),
        (f"heads {config.heads}", config.heads is not None),
        ("first step reads the window", config.first_step == "window"),
    ]
    said = [name for name, applies in limits if applies]
    if kept is None or (source is not None and kept >= source):
        return ", ".join(["all keys", *said]) if said else "exact"
    return ", ".join([f"keys {kept} of {'n' if source is None else source}", *said])
