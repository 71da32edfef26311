"""Finding checkpoints: folders, package data, the Hugging Face cache, downloads."""

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import save_file

from flashdreams.runtime.checkpoint import (
    CheckpointConfig,
    CheckpointError,
    describe_missing,
    ensure_local,
    find_local,
)
from tests.unit.runtime.hub import COMMIT, fetch_as_told, serve_repository

INDEX = "dit/model.safetensors.index.json"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty Hugging Face cache of our own."""
    folder = tmp_path / "cache"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    return folder


def use_endpoint(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    template = url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)


@pytest.fixture
def hub(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """A hub that offers ``org/name`` with two shards; yields the requests it has seen."""
    folder = tmp_path / "repository"
    (folder / "dit").mkdir(parents=True)
    write_index(folder / "dit", {"a": "model-1.safetensors", "b": "model-2.safetensors"})
    for name, number in (("a", 1), ("b", 2)):
        save_file({name: torch.full((3,), number)}, folder / "dit" / f"model-{number}.safetensors")
    save_file({"unwanted": torch.ones(3)}, folder / "other.safetensors")
    with serve_repository("org/name", folder) as (url, seen):
        use_endpoint(monkeypatch, url)
        yield seen


def write_index(folder: Path, weight_map: dict) -> Path:
    path = folder / "model.safetensors.index.json"
    path.write_text(json.dumps({"weight_map": weight_map}))
    return path


def fill_cache(cache: Path, *files: str) -> None:
    """Pretend that files of ``org/name`` had been downloaded."""
    snapshot = cache / "models--org--name" / "snapshots" / COMMIT
    refs = cache / "models--org--name" / "refs"
    refs.mkdir(parents=True, exist_ok=True)
    (refs / "main").write_text(COMMIT)
    for file in files:
        (snapshot / file).parent.mkdir(parents=True, exist_ok=True)
        (snapshot / file).touch()


def one_line(error: pytest.ExceptionInfo) -> str:
    text = str(error.value)
    assert "\n" not in text
    return text


def test_find_local_takes_a_file_or_the_only_checkpoint_of_a_folder(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    path.touch()
    (tmp_path / "notes.txt").touch()
    for source in (path, tmp_path):
        local = find_local(CheckpointConfig(source=str(source)))
        assert local is not None and local.files == (path,) and local.tensor_files is None


def test_find_local_takes_the_named_file_of_a_folder(tmp_path: Path) -> None:
    for name in ("a.pt", "b.pt"):
        (tmp_path / name).touch()
    local = find_local(CheckpointConfig(source=str(tmp_path), file="checkpoints/b.pt"))
    assert local is not None and local.files == (tmp_path / "b.pt",)
    with pytest.raises(CheckpointError, match=r"has no c\.pt; it has: a\.pt, b\.pt\. Name a file"):
        find_local(CheckpointConfig(source=str(tmp_path), file="c.pt"))
    with pytest.raises(CheckpointError, match=r"2 candidates: a\.pt, b\.pt\. Choose one with"):
        find_local(CheckpointConfig(source=str(tmp_path)))


def test_a_folder_without_a_checkpoint_is_not_said_to_be_missing(tmp_path: Path) -> None:
    (tmp_path / "transformer").mkdir()  # as in a repository of diffusers
    (tmp_path / "model_index.json").touch()
    with pytest.raises(CheckpointError, match=r"it has: model_index\.json, transformer\. Name"):
        find_local(CheckpointConfig(source=str(tmp_path)))
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(CheckpointError, match="pipe is not a regular file"):
        find_local(CheckpointConfig(source=str(tmp_path / "pipe")))


def test_find_local_reads_an_index(tmp_path: Path) -> None:
    write_index(tmp_path, {"x": "1.safetensors", "y": "2.safetensors", "z": "1.safetensors"})
    for number in (1, 2):
        (tmp_path / f"{number}.safetensors").touch()
    local = find_local(CheckpointConfig(source=str(tmp_path)))
    assert local is not None
    assert local.files == (tmp_path / "1.safetensors", tmp_path / "2.safetensors")
    assert local.tensor_files is not None and local.tensor_files["z"] == local.files[0]


def test_find_local_refuses_an_index_that_names_a_missing_shard(tmp_path: Path) -> None:
    write_index(tmp_path, {"x": "1.safetensors", "y": "2.safetensors"})
    (tmp_path / "1.safetensors").touch()
    with pytest.raises(CheckpointError) as caught:
        find_local(CheckpointConfig(source=str(tmp_path)))
    assert "2 shards and 1 of them are missing: 2.safetensors" in one_line(caught)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": []}'])
def test_find_local_refuses_what_is_no_index(tmp_path: Path, text: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(CheckpointError, match="is not a shard index"):
        find_local(CheckpointConfig(source=str(tmp_path)))


@pytest.mark.parametrize("name", ["../w.safetensors", "/w.safetensors", "", 3])
def test_find_local_refuses_an_index_that_leaves_its_folder(tmp_path: Path, name: object) -> None:
    write_index(tmp_path, {"x": name})
    with pytest.raises(CheckpointError, match="should name files in its own folder"):
        find_local(CheckpointConfig(source=str(tmp_path)))


def test_find_local_takes_package_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "some_package_with_weights"
    (package / "weights").mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "weights" / "x.safetensors").touch()
    monkeypatch.syspath_prepend(str(tmp_path))
    try:
        source = "package:some_package_with_weights/weights/x.safetensors"
        local = find_local(CheckpointConfig(source=source))
        assert local is not None and local.files == (package / "weights" / "x.safetensors",)
    finally:
        sys.modules.pop("some_package_with_weights", None)
    with pytest.raises(CheckpointError, match="no package 'no_such_package' is installed"):
        find_local(CheckpointConfig(source="package:no_such_package/x.safetensors"))


def test_missing_local_weights_say_what_was_wanted(tmp_path: Path) -> None:
    for source in (str(tmp_path / "none.safetensors"), "weights/none.pt"):
        with pytest.raises(CheckpointError, match=f"Not on this machine: {source}"):
            ensure_local(CheckpointConfig(source=source, download=True))


@pytest.mark.parametrize(
    ("source", "file"),
    [("org/name", "dit/w.pt"), ("hf://org/name", "dit/w.pt"), ("hf://org/name/dit/w.pt", None)],
)
def test_find_local_looks_into_the_cache(cache: Path, source: str, file: str | None) -> None:
    config = CheckpointConfig(source=source, file=file)
    assert find_local(config) is None
    fill_cache(cache, "dit/w.pt")
    local = find_local(config)
    assert local is not None and local.files[0].name == "w.pt" and local.files[0].exists()
    assert find_local(CheckpointConfig(source=source, file=file, revision="v2")) is None


def test_a_folder_of_the_same_name_comes_before_the_hub(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "org" / "name").mkdir(parents=True)
    (tmp_path / "org" / "name" / "w.pt").touch()
    monkeypatch.chdir(tmp_path)
    local = find_local(CheckpointConfig(source="org/name", file="w.pt"))
    assert local is not None and local.files == (Path("org/name/w.pt"),)


def test_sources_that_say_too_little_are_refused(cache: Path) -> None:
    with pytest.raises(CheckpointError, match="name its file with"):
        ensure_local(CheckpointConfig(source="org/name"))
    with pytest.raises(CheckpointError, match="should read hf://org/repo"):
        ensure_local(CheckpointConfig(source="hf://name"))


def test_missing_weights_say_what_they_need_and_how_to_get_them(cache: Path) -> None:
    config = CheckpointConfig(
        source="org/name",
        file="checkpoints/w.pt",
        revision="abc",
        size_bytes=5_676_000_000,
        license="CC BY-NC-SA 4.0",
    )
    with pytest.raises(CheckpointError) as caught:
        ensure_local(config)
    text = str(caught.value)
    for part in (
        "org/name, file checkpoints/w.pt, revision abc",
        "5.7 GB on disk, licence: CC BY-NC-SA 4.0",
        str(cache),
        "hf download org/name checkpoints/w.pt --revision abc",
        "set checkpoint.download=True",
    ):
        assert part in text
    flag = "--pipeline.decoder.checkpoint.download"
    assert f"{flag} True" in describe_missing(config, flag=flag)
    assert not cache.exists(), "nothing is downloaded before it is allowed"
    sharded = CheckpointConfig(source="hf://org/name", file=INDEX, size_bytes=45_000_000)
    assert "hf download org/name --include 'dit/model*'" in describe_missing(sharded)
    assert "45.0 MB" in describe_missing(sharded)


def test_the_command_of_the_message_fetches_every_shard(hub: list[str], cache: Path) -> None:
    config = CheckpointConfig(source="org/name", file=INDEX)
    with pytest.raises(CheckpointError, match="Not on this machine") as caught:
        ensure_local(config)
    assert fetch_as_told(str(caught.value), constants.ENDPOINT, cache).startswith("hf download")
    assert [path.name for path in ensure_local(config).files] == [
        "model-1.safetensors",
        "model-2.safetensors",
    ]


def test_nothing_is_asked_of_the_hub_unless_allowed(hub: list[str]) -> None:
    with pytest.raises(CheckpointError, match="Not on this machine"):
        ensure_local(CheckpointConfig(source="org/name", file=INDEX))
    with pytest.raises(CheckpointError, match="Not on this machine"):
        config = CheckpointConfig(source="org/name", file=INDEX, download=True)
        ensure_local(config, allow_download=False)
    assert hub == []


def test_download_fetches_the_shards_of_an_index_once(cache: Path, hub: list[str]) -> None:
    config = CheckpointConfig(source="org/name", file=INDEX, download=True)
    local = ensure_local(config)
    assert [path.name for path in local.files] == ["model-1.safetensors", "model-2.safetensors"]
    assert not any("other.safetensors" in request for request in hub)
    count = len(hub)
    assert ensure_local(config) == local
    assert len(hub) == count
    local.files[1].unlink()
    assert find_local(config) is None
    ensure_local(config)
    fetched = [request for request in hub[count:] if request.startswith("GET /org/name/resolve")]
    assert not any("model-1" in request for request in fetched)


def test_download_of_a_file_that_is_not_there_is_one_line(hub: list[str]) -> None:
    with pytest.raises(CheckpointError) as caught:
        ensure_local(CheckpointConfig(source="org/name", file="none.pt", download=True))
    assert "Could not download none.pt of org/name, revision main: " in one_line(caught)


def test_download_without_a_network_is_one_line(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_endpoint(monkeypatch, "http://127.0.0.1:9")
    monkeypatch.setattr("time.sleep", lambda _: None)  # the hub's client waits between attempts
    with pytest.raises(CheckpointError) as caught:
        ensure_local(CheckpointConfig(source="org/name", file="w.pt", download=True))
    text = one_line(caught)
    assert "the Hugging Face Hub cannot be reached" in text
    assert "hf download org/name w.pt" in text


def test_download_in_offline_mode_asks_nothing(
    hub: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match="HF_HUB_OFFLINE is set") as caught:
        ensure_local(CheckpointConfig(source="org/name", file=INDEX, download=True))
    assert hub == []
    assert "let this program do it" not in str(caught.value)  # that is what was tried


def test_download_is_refused_where_the_disk_is_too_small(hub: list[str]) -> None:
    config = CheckpointConfig(source="org/name", file=INDEX, download=True, size_bytes=10**18)
    with pytest.raises(CheckpointError, match=r"needs 1000000000.0 GB on disk and .* GB left"):
        ensure_local(config)
    assert hub == []


def test_a_download_that_leaves_a_gap_is_an_error(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *_, **__: "nowhere")
    with pytest.raises(CheckpointError, match="files are still missing in the cache"):
        ensure_local(CheckpointConfig(source="org/name", file="w.pt", download=True))
