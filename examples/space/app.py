"""A Gradio Space: what `graft-demo` serves, with the model that the variable GRAFT_MODEL names.

GRAFT_MODEL=.cache/smollm2-135m-instruct python examples/space/app.py
"""

import os

from graft.scripts.demo import DEFAULT_MODEL, main

if __name__ == "__main__":
    inside = "SPACE_ID" in os.environ  # a Space is reached through its proxy, a laptop by nobody else
    host = ["--host", "0.0.0.0"] if inside else []
    raise SystemExit(main([os.environ.get("GRAFT_MODEL", DEFAULT_MODEL), *host]))
