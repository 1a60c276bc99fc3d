"""Invariants: texts longer than a model's positions are refused, with both numbers; so are texts that change the others
of their pack by the rotary embedding's scaling."""

import json
from pathlib import Path
from typing import Any

import pytest

from anchor.data.positions import check_positions, check_positions_of_folder
from anchor.errors import DataError


def limit(config: dict[str, Any]) -> int | None:
    """Return the longest accepted text, read from the error about a longer one."""
    try:
        check_positions(config, "m", 10**9, "x: text.max_tokens")
    except DataError as error:
        found = int(str(error).rpartition("at most ")[2].removesuffix(" tokens"))
        check_positions(config, "m", found, "x: text.max_tokens")
        return found
    return None


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"max_position_embeddings": 256}, 256),
        ({"max_position_embeddings": 256, "rope_scaling": None}, 256),
        ({"max_position_embeddings": 256, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}, 256),
        ({}, None),
        ({"max_position_embeddings": None}, None),
        ({"max_position_embeddings": "many"}, None),
        ({"max_position_embeddings": 131072, "rope_scaling": {"rope_type": "llama3", "factor": 32.0}}, 131072),
        # The number of positions before scaling (Qwen's model cards), or after it.
        ({"max_position_embeddings": 256, "rope_scaling": {"type": "yarn", "factor": 4.0}}, 1024),
        (
            {
                "max_position_embeddings": 1024,
                "rope_parameters": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256},
            },
            1024,
        ),
        ({"max_position_embeddings": 256, "rope_scaling": {"type": "linear", "factor": 2.0}}, 512),
        # With this scaling, a pack's longest text would change the others.
        ({"max_position_embeddings": 256, "rope_scaling": {"type": "dynamic", "factor": 4.0}}, 256),
        (
            {
                "max_position_embeddings": 131072,
                "original_max_position_embeddings": 4096,
                "rope_scaling": {"type": "longrope", "long_factor": [1.0]},
            },
            4096,
        ),
        (
            {
                "max_position_embeddings": 131072,
                "rope_parameters": {"rope_type": "longrope", "original_max_position_embeddings": 8192},
            },
            8192,
        ),
    ],
)
def test_the_longest_text_of_a_model(config: dict[str, Any], expected: int | None) -> None:
    assert limit(config) == expected


def test_the_message_has_both_numbers_and_the_reason(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"max_position_embeddings": 256}))
    check_positions_of_folder(str(tmp_path), 256, "x")
    check_positions_of_folder(str(tmp_path / "nowhere"), 257, "x")
    with pytest.raises(DataError) as caught:
        check_positions_of_folder(str(tmp_path), 1024, "pack.yaml: text.max_tokens")
    assert str(caught.value) == (
        f"pack.yaml: text.max_tokens is 1024, but {tmp_path} has 256 positions (max_position_embeddings); give texts "
        "at most 256 tokens"
    )
    rope = {"max_position_embeddings": 256, "rope_scaling": {"type": "dynamic", "factor": 4.0}}
    with pytest.raises(DataError, match="rope_type dynamic: beyond them the longest text of a pack changes the others"):
        check_positions(rope, "m", 257, "x")


def test_an_unreadable_configuration_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(DataError, match=r"config\.json: not readable as JSON: "):
        check_positions_of_folder(str(tmp_path), 8, "x")
