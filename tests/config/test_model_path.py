"""Invariants: a folder, a GGUF file and a hub name are told apart by what is there, and everything else is refused."""

from pathlib import Path

import pytest

from anchor.config.model_path import ModelPath, resolve_model_path
from anchor.errors import ModelError


def test_folders_gguf_files_and_hub_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.json").touch()
    (tmp_path / "m.gguf").touch()
    assert resolve_model_path(str(tmp_path)) == ModelPath(str(tmp_path), None)
    gguf = resolve_model_path(str(tmp_path / "m.gguf"))
    assert (gguf.name, gguf.kwargs()) == (str(tmp_path), {"gguf_file": "m.gguf"})
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    assert resolve_model_path("owner/name") == ModelPath("owner/name", None)
    assert resolve_model_path("owner/name").kwargs() == {}


def test_a_tokenizer_alone_is_enough_only_for_a_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").touch()
    files = ("config.json", "tokenizer.json")
    assert resolve_model_path(str(tmp_path), files) == ModelPath(str(tmp_path), None)
    with pytest.raises(ModelError) as caught:
        resolve_model_path(str(tmp_path))
    assert str(caught.value) == (
        f"{tmp_path}: not a model folder, it has no config.json; an exported model is in RUN/export"
    )


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("no/such.gguf", "no/such.gguf: no such GGUF file"),
        (
            "owner/name",
            "owner/name: no such model folder (its cache has none either, and hub names are looked up only when "
            "HF_HUB_OFFLINE is not 1)",
        ),
        ("./own/x", "./own/x: no such model folder (hub names are looked up only when HF_HUB_OFFLINE is not 1)"),
    ],
)
@pytest.mark.parametrize("yes", ["1", "True"])
def test_what_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch, path: str, expected: str, yes: str) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", yes)
    with pytest.raises(ModelError) as caught:
        resolve_model_path(path)
    assert str(caught.value) == expected


def test_without_a_network_the_cache_of_the_hub_is_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Regression: the model was refused although transformers would have loaded it from the cache."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    snapshot = tmp_path / "models--owner--name/snapshots/abc"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    (tmp_path / "models--owner--name/refs").mkdir()
    (tmp_path / "models--owner--name/refs/main").write_text("abc")
    assert resolve_model_path("owner/name") == ModelPath("owner/name", None)
    with pytest.raises(ModelError, match="its cache has none either"):
        resolve_model_path("owner/other")
