"""Invariants: no command runs Python of a model folder, whatever standard input says; pickled weights are loaded
as tensors or refused in one line.
"""

import ast
import io
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from anchor.data.tokenizer_files import load_tokenizer
from anchor.encoding.encoder import Encoder
from anchor.encoding.opening import open_encoder
from anchor.errors import AnchorError, ConfigError, ModelError
from anchor.models.backbone import read_config
from data_prep.mining.dense import load_model

ROOT = Path(__file__).parents[2]
PICKLED = "its weights are a pickle (.bin) that is damaged or asks for more than tensors; save them as safetensors"


def change(file: Path, **values: Any) -> None:
    about = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps(about | values), encoding="utf-8")


def with_code(source: Path, folder: Path) -> tuple[Path, Path]:
    """Copy a folder whose configuration names its own classes; return it and the file that their module would leave."""
    shutil.copytree(source, folder)
    ran = folder / "ran"
    code = f"open({str(ran)!r}, 'w').close()\nfrom transformers import LlamaConfig as C, LlamaForCausalLM as M\n"
    code += "from transformers import PreTrainedTokenizerFast as T\n"
    (folder / "evil.py").write_text(code, encoding="utf-8")
    classes = {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M", "AutoModel": "evil.M"}
    change(folder / "config.json", model_type="evil", auto_map=classes)
    change(folder / "tokenizer_config.json", tokenizer_class="Evil", auto_map={"AutoTokenizer": [None, "evil.T"]})
    return folder, ran


@pytest.fixture
def says_yes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 99))


def test_a_yes_on_standard_input_runs_no_code_of_a_model_folder(export_dir: Path, tmp_path: Path) -> None:
    """Regression: `transformers` asked on the command's own standard input, and a text "y" was the answer."""
    folder, ran = with_code(export_dir, tmp_path / "evil")
    command = [sys.executable, "-m", "eval", "embed", str(folder), "--input", "-", "--output", str(tmp_path / "v")]
    done = subprocess.run(
        command, cwd=ROOT, input="y\nhello\n", capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 2, done.stderr
    assert done.stderr.splitlines()[-1].startswith(f"error: {folder}: ")
    assert "Traceback" not in done.stderr
    assert not ran.exists()
    assert not (tmp_path / "v").exists()


def test_neither_a_configuration_nor_a_tokenizer_runs_code(export_dir: Path, tmp_path: Path, says_yes: None) -> None:
    folder, ran = with_code(export_dir, tmp_path / "evil")
    for read in (read_config, load_tokenizer):
        try:
            read(str(folder))
        except ModelError as error:
            assert "\n" not in str(error)
        assert not ran.exists()
    with pytest.raises(ModelError, match="custom code"):
        read_config(str(folder))


def test_folders_of_sentence_transformers_run_no_code(export_dir: Path, tmp_path: Path, says_yes: None) -> None:
    folder, ran = with_code(export_dir, tmp_path / "evil")
    (folder / "anchor.json").unlink()
    module = {"idx": 0, "name": "0", "path": "", "type": "evil.M"}
    for modules in (None, [module]):
        if modules is not None:
            (folder / "modules.json").write_text(json.dumps(modules), encoding="utf-8")
        for read in (lambda: open_encoder(folder, dtype="fp32"), lambda: load_model(folder, "cpu")):
            with pytest.raises(AnchorError) as caught:
                read()
            assert "\n" not in str(caught.value)
            assert not ran.exists()


def test_every_loader_is_told_to_trust_nothing() -> None:
    """Without trust_remote_code=False, transformers asks on standard input."""
    told, silent = 0, []
    for file in (one for package in ("anchor", "data_prep", "eval") for one in sorted((ROOT / package).rglob("*.py"))):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            called = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
            if not re.fullmatch(r"Auto\w+\.from_pretrained|SentenceTransformer", called):
                continue
            given = {one.arg: ast.unparse(one.value) for one in node.keywords}
            told += given.get("trust_remote_code") == "False"
            silent += [f"{file.name}: {called}"] if given.get("trust_remote_code") != "False" else []
    assert told >= 6
    assert silent == ["anchor_encoder.py: AutoModelForCausalLM.from_pretrained"]  # its `options` say so


class Evil:
    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, (f"touch {self.file}",)


def test_pickled_weights_are_tensors_or_one_line(export_dir: Path, tmp_path: Path) -> None:
    """Regression: for a pickle that asks to run code, torch's traceback advised the user to load it anyway."""
    folder = Path(shutil.copytree(export_dir, tmp_path / "pickled"))
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    file, ran = folder / "pytorch_model.bin", tmp_path / "ran"
    torch.save(weights, file)
    whole = Encoder(folder, dtype="fp32")
    assert (whole.encode(["a b"]) == Encoder(export_dir, dtype="fp32").encode(["a b"])).all()
    contents = [file.read_bytes()]
    torch.save(weights | {"x": Evil(ran)}, file)
    contents.append(file.read_bytes())
    for content in (contents[1], b"", b"version https://git-lfs.github.com/spec/v1\n", contents[0][:5000]):
        file.write_bytes(content)
        with pytest.raises(ModelError) as caught:
            Encoder(folder, dtype="fp32")
        assert str(caught.value).startswith(f"{folder}: the model could not be loaded: ")
        assert content != contents[1] or str(caught.value).endswith(PICKLED)
        assert "\n" not in str(caught.value)
    file.write_bytes(contents[1])
    (folder / "anchor.json").unlink()
    with pytest.raises(ModelError) as of_eval:
        open_encoder(folder, dtype="fp32")
    assert str(of_eval.value) == f"{folder}: sentence-transformers cannot read it: {PICKLED}"
    with pytest.raises(ConfigError) as of_mining:
        load_model(folder, "cpu")
    assert str(of_mining.value) == f"--model {folder}: cannot be loaded: {PICKLED}"
    assert not ran.exists()


def test_pickled_weights_have_a_revision_of_their_own(export_dir: Path, tmp_path: Path) -> None:
    """Regression: only safetensors counted, so all folders of pickles had one revision and shared their scores."""
    folder = Path(shutil.copytree(export_dir, tmp_path / "pickled"))
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    revisions = set()
    for scale in (1.0, 2.0):
        torch.save({name: scale * value for name, value in weights.items()}, folder / "pytorch_model.bin")
        revisions.add(Encoder(folder, dtype="fp32").revision())
    assert len(revisions) == 2
