import ast
import importlib
import json
import re
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from stranger import program_without
from transformers import AutoConfig
from transformers.dynamic_module_utils import check_imports, get_relative_import_files

import graft
import graft.atomic_files
import graft.modeling.remote_code
from graft.modeling.remote_code import flat_source, write_remote_code

# A process that loads a saved folder as a stranger would: graft cannot be imported there.
STRANGER = (
    program_without("graft", "tinywing")
    + """
import json
import transformers
"""
)


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Writes a package of modules, given as {path: text}, where it can be imported; returns its root."""
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    before = set(sys.modules)

    def write(modules: dict[str, str], name: str = "tinywing") -> Path:
        root = tmp_path / "site" / name
        for path, text in modules.items():
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            (root / path).write_text(text, encoding="utf-8")
        for folder in [root, *(path for path in root.rglob("*") if path.is_dir())]:
            (folder / "__init__.py").touch()
        importlib.invalidate_caches()
        return root

    yield write
    for name in set(sys.modules) - before:
        if name.partition(".")[0] == "tinywing":
            del sys.modules[name]


def relative_imports(text: str) -> list[str]:
    """The unparsed relative imports of a text, in order."""
    nodes = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.ImportFrom) and node.level]
    return [ast.unparse(node) for node in sorted(nodes, key=lambda node: node.lineno)]


def test_the_closure_is_followed_through_packages_and_every_form_of_import(package):
    package(
        {
            "models/model.py": (
                '"""Doc."""\n'
                "from typing import TYPE_CHECKING\n"
                "from ..shared.deep.windows import (\n    first,  # a comment\n    second as other,\n)\n"
                "from .parts import part\n"
                "if TYPE_CHECKING:\n    from ..shared.types_only import Shape\n"
                "def late():\n    from ..shared.lazy import thing; return thing\n"
                "é = 'é'; after = 1\n"
            ),
            "models/parts.py": "from ..shared.deep.windows import first\npart = 1\n",
            "shared/deep/windows.py": "first = second = 1\n",
            "shared/types_only.py": "Shape = int\n",
            "shared/lazy.py": "thing = 1\n",
            "shared/not_reached.py": "raise RuntimeError\n",
        }
    )
    source = flat_source("tinywing.models.model")
    assert sorted(source) == ["lazy", "model", "parts", "types_only", "windows"]
    assert relative_imports(source["model"]) == [
        "from .windows import first, second as other",
        "from .parts import part",
        "from .types_only import Shape",
        "from .lazy import thing",
    ]
    assert "    from .lazy import thing; return thing\né = 'é'; after = 1\n" in source["model"]


def test_only_imports_and_the_header_differ_from_the_source(package):
    package(
        {
            "__init__.py": "__version__ = '9.8.7'\n",
            "a/model.py": "# first\nfrom ..b.parts import (\n    part,\n)\n\n\nx = '''\n\x0c  kept\n'''\n",
            "b/parts.py": "# only a comment",
        }
    )
    source = flat_source("tinywing.a.model")
    header, _, rest = source["model"].partition("\n")
    assert header.startswith("# Part of tinywing 9.8.7, tinywing.a.model, copied here")
    assert rest == "# first\nfrom .parts import part\n\n\nx = '''\n\x0c  kept\n'''\n"
    assert source["parts"].partition("\n")[2] == "# only a comment"


def test_modules_that_import_each_other_are_written_once(package):
    package(
        {
            "m/one.py": "from .two import b\na = 1\n",
            "m/two.py": "def f():\n    from .one import a\n    return a\nb=2\n",
        }
    )
    assert sorted(flat_source("tinywing.m.one")) == ["one", "two"]


def test_what_is_written_satisfies_the_loader_of_transformers(package, tmp_path):
    package(
        {
            "m/model.py": "import torch\nimport json\nfrom ..n.parts import part\ntry:\n    import no_such_thing\n"
            "except ImportError:\n    pass\n",
            "n/parts.py": "from transformers.utils import is_sklearn_available\n"
            "if is_sklearn_available():\n    import sklearn_is_absent\npart = 1\n",
        }
    )
    for name, text in flat_source("tinywing.m.model").items():
        (tmp_path / f"{name}.py").write_text(text)
    assert check_imports(tmp_path / "model.py") == ["parts"]
    assert get_relative_import_files(tmp_path / "model.py") == [str(tmp_path / "parts.py")]


@pytest.mark.parametrize(
    ("modules", "message"),
    [
        ({"m/model.py": "import networkx\n"}, r"tinywing\.m\.model, line 1: `networkx` may be absent.*torch"),
        ({"m/model.py": "def f():\n    import faiss.contrib\n"}, r"line 2: `faiss\.contrib` may be absent"),
        (
            {"m/model.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import peft\n"},
            "line 3: `peft` may be absent",
        ),
        ({"m/model.py": "if undefined_available():\n    import peft\n"}, "line 2: `peft` may be absent"),
        ({"m/model.py": "import tinywing.m.parts\n", "m/parts.py": ""}, r"`tinywing\.m\.parts` may be absent"),
        ({"m/model.py": "from graft.modeling import x\n"}, r"`graft\.modeling` may be absent.*relatively"),
        ({"m/model.py": "from . import parts\n", "m/parts.py": ""}, r"line 1: `from \. import \.\.\.` cannot"),
        ({"m/model.py": "from .sub import parts\n", "m/sub/parts.py": ""}, r"tinywing\.m\.sub is a package"),
        ({"m/model.py": "from .absent import x\n"}, r"tinywing\.m\.absent cannot be saved: it is no module"),
        ({"m/model.py": "from ....above import x\n"}, "line 1: attempted relative import beyond top-level package"),
        (
            {"m/model.py": "from ..n.parts import x\nfrom ..o.parts import y\n", "n/parts.py": "", "o/parts.py": ""},
            r"(n|o)\.parts and tinywing\.(n|o)\.parts would both be saved as parts\.py",
        ),
        ({"m/model.py": "from .queue import x\n", "m/queue.py": ""}, r"queue\.py, the name of a standard module"),
        (
            {"m/model.py": "from .modeling_bart import x\n", "m/modeling_bart.py": "import transformers.models.bart\n"
             "from transformers.models.bart.modeling_bart import BartModel\n"},
            "line 2: a file that imports `transformers.models.bart.modeling_bart` must not share its name",
        ),
        ({"m/model.py": "x = 1; from .parts import y\n", "m/parts.py": ""}, r"would mistake \['parts'\]"),
        ({"m/model.py": '"""Usage:\n\n    from .example import x\n"""\n'}, r"would mistake \['example'\]"),
    ],
)  # fmt: skip
def test_what_would_not_load_elsewhere_is_refused_with_one_line(package, modules, message):
    package(modules)
    with pytest.raises(ValueError, match=message) as caught:
        flat_source("tinywing.m.model")
    assert "\n" not in str(caught.value)


def test_a_class_of_a_script_is_refused():
    with pytest.raises(ValueError, match="__main__ cannot be saved: it is no module"):
        flat_source("__main__")


CONFIGURATION = """
from transformers import PreTrainedConfig


class TinyConfig(PreTrainedConfig):
    model_type = "tinywing"
    hidden_size: int = 8
"""

MODELING = """
import torch
from torch import nn
from transformers import PreTrainedModel

from ...configuration.configuration_tiny import (
    TinyConfig,
)
from ..remote_code import SavesItsCode
from .scaling import scale


class TinyModel(SavesItsCode, PreTrainedModel):
    config_class = TinyConfig
    auto_classes = ("AutoModel", "AutoModelForCausalLM")

    def __init__(self, config):
        super().__init__(config)
        self.projection = nn.Linear(config.hidden_size, config.hidden_size)
        self.post_init()

    def forward(self, x):
        return scale(self.projection(x))
"""


def tiny_wing() -> dict[str, str]:
    """A package laid out as graft is, with our own writer in it."""
    return {
        "__init__.py": "__version__ = '1.2.3'\n",
        "atomic_files.py": Path(graft.atomic_files.__file__).read_text(),
        "configuration/configuration_tiny.py": CONFIGURATION,
        "modeling/remote_code.py": Path(graft.modeling.remote_code.__file__).read_text(),
        "modeling/tiny/modeling_tiny.py": MODELING,
        "modeling/tiny/scaling.py": "def scale(x):\n    return 3 * x\n",
    }


@pytest.fixture
def model(package):
    package(tiny_wing())
    modeling = importlib.import_module("tinywing.modeling.tiny.modeling_tiny")
    torch.manual_seed(0)
    return modeling.TinyModel(modeling.TinyConfig(hidden_size=4))


def stranger(program: str, tmp_path: Path, **variables: str) -> dict:
    """Runs a program where graft cannot be imported; returns the JSON of its last line."""
    environment = {
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(tmp_path / "hf"),
        "OMP_NUM_THREADS": "1",
        "PATH": "",
    } | variables
    done = subprocess.run(
        [sys.executable, "-c", STRANGER + program],
        stdin=subprocess.DEVNULL,  # nobody is there to be asked for trust
        capture_output=True,
        text=True,
        env=environment,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_a_saved_folder_loads_where_graft_is_absent_and_saves_itself_again(model, tmp_path):
    x = torch.randn(2, 4, generator=torch.Generator().manual_seed(1))
    first, second = tmp_path / "my.model-1", tmp_path / "again"
    model.save_pretrained(first)
    shutil.rmtree(tmp_path / "site")
    answer = stranger(
        f"""
x = torch.tensor({x.tolist()!r})
try:
    transformers.AutoModel.from_pretrained({str(first)!r})
    refusal = None
except ValueError as error:
    refusal = str(error)
loaded = transformers.AutoModelForCausalLM.from_pretrained({str(first)!r}, trust_remote_code=True)
loaded.save_pretrained({str(second)!r})
again = transformers.AutoModel.from_pretrained({str(second)!r}, trust_remote_code=True)
print("\\n" + json.dumps({{
    "refusal": refusal,
    "modules": [type(loaded).__module__, type(again).__module__, type(again.config).__module__],
    "first": loaded(x).tolist(),
    "second": again(x).tolist(),
    "graft": any(name.partition(".")[0] == "graft" for name in sys.modules),
}}))
""",
        tmp_path,
    )
    assert "trust_remote_code=True" in answer["refusal"]
    assert all(name.startswith("transformers_modules.") for name in answer["modules"])
    assert not answer["graft"]
    expected = model(x).tolist()
    assert answer["first"] == expected
    assert answer["second"] == expected
    names = sorted(path.name for path in first.glob("*.py"))
    assert names == ["atomic_files.py", "configuration_tiny.py", "modeling_tiny.py", "remote_code.py", "scaling.py"]
    for path in [*first.glob("*.py"), first / "config.json"]:
        assert (second / path.name).read_bytes() == path.read_bytes(), path.name


def test_the_saved_config_names_the_code_for_each_auto_class(model, tmp_path):
    model.save_pretrained(tmp_path / "saved")
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert config["auto_map"] == {
        "AutoConfig": "configuration_tiny.TinyConfig",
        "AutoModel": "modeling_tiny.TinyModel",
        "AutoModelForCausalLM": "modeling_tiny.TinyModel",
    }
    assert AutoConfig.from_pretrained(tmp_path / "saved", trust_remote_code=True).hidden_size == 4


def test_saving_again_into_a_folder_refreshes_its_code(model, tmp_path):
    model.save_pretrained(tmp_path)
    (tmp_path / "scaling.py").write_text("damaged")
    model.save_pretrained(tmp_path)
    assert re.search("return 3", (tmp_path / "scaling.py").read_text())


def test_a_process_that_is_not_the_main_one_writes_no_code(model, tmp_path):
    model.save_pretrained(tmp_path / "saved", is_main_process=False)
    assert not list((tmp_path / "saved").glob("*.py"))


class TinyHub(BaseHTTPRequestHandler):
    """As much of the Hub as a push of small files asks for; keeps the paths of each commit."""

    commits: ClassVar[list[set[str]]] = []

    def log_message(self, *args):
        pass

    def do_HEAD(self):  # asked for a README that it has not
        self.send_response(404)
        self.send_header("X-Error-Code", "EntryNotFound")
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_GET = do_HEAD

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.path == "/api/repos/create":
            reply = {"url": f"http://{self.headers['Host']}/me/tiny", "name": "me/tiny", "id": "1"}
        elif self.path == "/api/validate-yaml":
            reply = {"errors": [], "warnings": []}
        elif "/preupload/" in self.path:
            files = [file["path"] for file in json.loads(body)["files"]]
            reply = {"files": [{"path": path, "uploadMode": "regular", "shouldIgnore": False} for path in files]}
        else:
            assert "/commit/" in self.path, self.path
            lines = [json.loads(line) for line in body.splitlines()]
            self.commits.append({line["value"]["path"] for line in lines if line["key"] == "file"})
            reply = {"commitUrl": f"http://{self.headers['Host']}/me/tiny/commit/{'0' * 40}", "commitOid": "0" * 40}
        content = json.dumps(reply).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


def test_each_push_carries_the_code_also_into_a_folder_that_had_it(package, tmp_path):
    package(tiny_wing())
    TinyHub.commits.clear()
    with ThreadingHTTPServer(("127.0.0.1", 0), TinyHub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        stranger(
            f"""
sys.meta_path.pop(0)
sys.path.insert(0, {str(tmp_path / "site")!r})
from tinywing.modeling.tiny.modeling_tiny import TinyConfig, TinyModel
for _ in range(2):
    TinyModel(TinyConfig()).save_pretrained(
        {str(tmp_path / "saved")!r}, push_to_hub=True, repo_id="me/tiny", token="hf_test"
    )
print("\\n{{}}")
""",
            tmp_path,
            HF_ENDPOINT=f"http://127.0.0.1:{server.server_port}",
            HF_HUB_DISABLE_XET="1",
            HF_HUB_OFFLINE="0",
        )
        server.shutdown()
    code = {path.name for path in (tmp_path / "saved").glob("*.py")}
    assert len(TinyHub.commits) == 2
    for commit in TinyHub.commits:
        assert code | {"config.json", "model.safetensors"} <= commit


def test_a_refused_save_writes_nothing(package, tmp_path):
    package(tiny_wing() | {"modeling/tiny/scaling.py": "import random_package\ndef scale(x):\n    return x\n"})
    package({"__init__.py": ""}, name="random_package")
    modeling = importlib.import_module("tinywing.modeling.tiny.modeling_tiny")
    tiny = modeling.TinyModel(modeling.TinyConfig(hidden_size=4))
    with pytest.raises(ValueError, match="`random_package` may be absent"):
        tiny.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()
    assert not hasattr(tiny.config, "auto_map")


@pytest.mark.parametrize("auto_classes", [("AutoModelForNothing",), ("AutoConfig",), ()])
def test_unknown_auto_classes_are_refused(model, tmp_path, auto_classes):
    with pytest.raises(ValueError, match="`auto_classes` must name"):
        write_remote_code(model, tmp_path / "saved", auto_classes)
    assert not (tmp_path / "saved").exists()


LAZY_IMPORT = "        from graft.retrieval.datastore import Datastore"
SIZES = {"vocab_size": 40, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}
BART = {
    "d_model": 8,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 16,
    "decoder_ffn_dim": 16,
    "max_position_embeddings": 32,
}
T5 = {"d_model": 8, "d_kv": 4, "d_ff": 16, "num_layers": 2, "num_heads": 2, "unlimiformer_config": {"window": 16}}
DECODER = {
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 32,
    "unlimiformer_config": {"local_tokens": 8},
}
PERMANENT = {
    "UnlimiformerBart": ("UnlimiformerBartConfig", BART),
    "UnlimiformerLlamaForCausalLM": ("UnlimiformerLlamaConfig", DECODER),
    "UnlimiformerQwen3ForCausalLM": (
        "UnlimiformerQwen3Config",
        {**DECODER, "num_key_value_heads": 1, "head_dim": 4},
    ),
    "UnlimiformerT5ForConditionalGeneration": ("UnlimiformerT5Config", T5),
}


def permanent_model(name: str):
    """A tiny model of a class that graft registers, and inputs for its forward."""
    config_name, options = PERMANENT[name]
    config = getattr(graft, config_name)(**SIZES, **options)
    torch.manual_seed(0)
    inputs = {"input_ids": torch.randint(3, 40, (1, 50)).tolist()}
    if config.is_encoder_decoder:
        inputs["decoder_input_ids"] = [[2, 5, 6]]
    return getattr(graft, name)(config).eval(), inputs


@pytest.mark.parametrize("name", PERMANENT)
def test_a_permanent_class_answers_bit_for_bit_where_graft_is_absent(name, tmp_path):
    model, inputs = permanent_model(name)
    model.save_pretrained(tmp_path / "saved")
    written = "".join(p.read_text() for p in tmp_path.rglob("*.py"))
    # Only an index needs graft: one import inside `try`, in the function that makes it.
    assert re.findall(r"^\s*(?:from|import) graft\b.*", written, re.M) == [LAZY_IMPORT]
    answer = stranger(
        f"""
auto_class = getattr(transformers, {type(model).auto_classes[0]!r})
loaded = auto_class.from_pretrained({str(tmp_path / "saved")!r}, trust_remote_code=True)
loaded.save_pretrained({str(tmp_path / "again")!r})
with torch.no_grad():
    logits = loaded(**{{name: torch.tensor(ids) for name, ids in {inputs!r}.items()}}).logits
print("\\n" + json.dumps({{"logits": logits.tolist(), "module": type(loaded).__module__}}))
""",
        tmp_path,
    )
    assert answer["module"].startswith("transformers_modules.")
    with torch.no_grad():
        expected = model(**{name: torch.tensor(ids) for name, ids in inputs.items()}).logits
    assert answer["logits"] == expected.tolist()
    for path in (tmp_path / "saved").glob("*.py"):
        assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes(), path.name
