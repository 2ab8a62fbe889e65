"""What people write: YAML and records, and the one line that tells what is wrong in them."""

import json
import math
from pathlib import Path

import pytest

from cadx.settings import parse_yaml, read_yaml
from components.contract import read_experiment, read_params
from components.train import TrainParams

RECIPE = {"model": {"family": "resnet"}, "preprocessing": {"height_px": 56, "width_px": 56}}


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"model": {"family": "resnett"}}, "model.family: input should be one of 'resnet', 'densenet', "),
        ({"model": {"family": "resnett"}}, "; did you mean 'resnet'?"),
        ({"model": {"depth": 18}}, "model.family: field required"),
        ({"model": "resnet"}, "model: input should be a mapping"),
        ({"model": {"family": "resnet", "depth": 19}}, "model.depth: input should be 18, 34 or 50"),
        (
            {"model": {"family": "resnet", "wdith": 1}},
            "model.wdith: unknown parameter; did you mean 'width'?",
        ),
        ({"loss": {"kind": "foccal"}}, "loss.kind: input should be 'cross_entropy' or 'focal'"),
        ({"loss": "focal"}, "loss: input should be a mapping or 'auto'"),
        ({"sampler": "even"}, "sampler: input should be 'natural' or 'balanced' or 'auto'"),
        (
            {"preprocessing": {"height": 56, "width_px": 56}},
            "preprocessing.height_px: field required; "
            "--params of train.preprocessing.height: unknown parameter; did you mean 'height_px'?",
        ),
        ({"sampler": {}}, "sampler: input should be 'natural' or 'balanced' or 'auto'"),
        ({"learning_rate": math.inf}, "learning_rate: input should be a finite number"),
        ({"augmentation": {"noise_std": "1e999"}}, "augmentation.noise_std: input should be a finite number"),
        ({"preprocessing": {"patch_px": [28, 28]}}, "preprocessing.patch_px.2: field required"),
    ],
)
def test_a_mistake_is_named_by_where_it_stands_and_not_by_the_branches_of_unions(
    section: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match="--params of train") as caught:
        read_params(json.dumps(RECIPE | section), "train", TrainParams)
    said = str(caught.value)
    if message.startswith(";"):
        assert said.endswith(message)
    elif message.endswith(" "):
        assert said.startswith(f"--params of train.{message}")
    else:
        assert said == f"--params of train.{message}"


def test_a_key_that_stands_twice_is_refused_and_a_merged_one_is_not() -> None:
    with pytest.raises(ValueError, match=r"params\.yaml: not YAML: 'epochs' stands twice line 3, column 3"):
        parse_yaml("train:\n  epochs: 3\n  epochs: 30\n", "params.yaml")
    merged = "base: &base\n  epochs: 3\n  seed: 1\nown:\n  <<: *base\n  epochs: 30\nother:\n  <<: *base\n"
    assert parse_yaml(merged, "params.yaml") == {
        "base": {"epochs": 3, "seed": 1},
        "own": {"epochs": 30, "seed": 1},
        "other": {"epochs": 3, "seed": 1},
    }


def test_a_file_that_is_no_yaml_is_named_with_its_line(tmp_path: Path) -> None:
    file = tmp_path / "params.yaml"
    file.write_text("own:\n  train: [\n")
    with pytest.raises(ValueError, match=r"params\.yaml: not YAML: .*line 3") as caught:
        read_yaml(file)
    assert "\n" not in str(caught.value)
    file.write_bytes(b"\x93NUMPY\xff\xfe")
    with pytest.raises(ValueError, match=r"params\.yaml: not YAML: "):
        read_yaml(file)


def test_a_date_that_is_none_is_no_yaml() -> None:
    for value in ("2001-13-45", "!!int abc", "!!timestamp abc"):
        with pytest.raises(ValueError, match=r"params\.yaml: not YAML: "):
            parse_yaml(f"own: {value}\n", "params.yaml")


@pytest.mark.parametrize("section", ["false", "[]", "''", "0"])
def test_a_section_that_is_no_mapping_does_not_stand_for_the_defaults(section: str, tmp_path: Path) -> None:
    file = tmp_path / "params.yaml"
    file.write_text(f"own:\n  train: {section}\n1: {{}}\nempty:\n")
    with pytest.raises(ValueError, match=r"own\.train: input should be a mapping"):
        read_params(f"{file}:own", "train", TrainParams)
    with pytest.raises(ValueError, match="no experiment 'other'; it holds: own, 1, empty"):
        read_experiment(file, "other")
    with pytest.raises(ValueError, match="empty: holds no sections"):
        read_experiment(file, "empty")


def test_a_section_that_is_no_step_is_refused_for_every_reader(tmp_path: Path) -> None:
    file = tmp_path / "params.yaml"
    file.write_text("own:\n  ingest: {source: own}\n  trian: {epochs: 3}\n")
    with pytest.raises(ValueError, match=r"own\.trian: no such step; did you mean 'train'\?"):
        read_experiment(file, "own")
    file.write_text("own:\n  prologue: {}\n")
    with pytest.raises(ValueError, match=r"own\.prologue: no such step; there are: calibrate, choose, "):
        read_experiment(file, "own")
