"""Config files of strangers: refused soon, in one short line."""

import random
import time

import pytest

from flashdreams.infra.config_file import MAX_CONFIG_BYTES, dump_config, load_config
from flashdreams.integrations.self_forcing.config import RUNNER_CONFIGS

CONFIG = RUNNER_CONFIGS["self-forcing-tiny-random"]
TEXT = dump_config(CONFIG)


def refused(text: str) -> str:
    begin = time.process_time()
    with pytest.raises((ValueError, TypeError)) as caught:
        load_config(text, [CONFIG], "c.yaml")
    assert time.process_time() - begin < 20
    said = str(caught.value)
    assert len(said) < 8000 and said.isprintable() and "c.yaml" in said, said[:300]
    return said


def replaced(value: str) -> str:
    assert "seed: 0\n" in TEXT
    return TEXT.replace("seed: 0\n", f"seed: {value}\n", 1)


@pytest.mark.parametrize(
    "value",
    [
        "1:" * 40_000 + "1", "9" * 100_000, "!!int x", "!!float x", "!!int ''", "!!bool x",
        "!!timestamp x", "!!int 1_" + "0" * 90_000, "1" + ":59.5" * 9000, "'" + "x" * 100_000 + "'",
        "[" * 50_000, "{a: " * 20_000, "[" + "1," * 50_000 + "1]", '"\\e[2J"', "!" + "x" * 100_000,
        "&a [*a]", "!!python/object/apply:os.system [x]", "{? [1] : 2}", ".nan", "-.inf",
        "!!binary x", "{<<: 1}", "!!float " + "1:" * 30 + "1",
    ],
)  # fmt: skip
def test_hostile_values_end_in_one_line(value: str) -> None:
    refused(replaced(value))


@pytest.mark.parametrize("name", ["../../escaped", "/tmp/x", "a/b", '"a\\e[2J"', "x" * 50_000])
def test_no_name_of_a_file_becomes_a_path(name: str) -> None:
    said = refused(TEXT.replace(f"runner_name: {CONFIG.runner_name}", f"runner_name: {name}"))
    assert "must be of letters, digits" in said


def test_large_files_are_not_parsed() -> None:
    assert "is larger than" in refused(TEXT + "#" * MAX_CONFIG_BYTES)


def test_long_unknown_fields_are_cut() -> None:
    refused(TEXT + "x" * 100_000 + ": 1\n")
    refused("- a\n" * 30_000)
    refused("!" + "é" * 50_000 + " {}")


@pytest.mark.slow
def test_damage_anywhere_ends_in_one_line_or_in_a_config() -> None:
    random.seed(0)
    for at in range(0, len(TEXT), 25):
        for text in (TEXT[:at], TEXT[:at] + random.choice("\0\x1b:{[!&*'\"%@\t") + TEXT[at:]):
            try:
                load_config(text, [CONFIG], "c.yaml", lambda note: None)
            except (ValueError, TypeError) as error:
                assert "c.yaml" in str(error) and str(error).isprintable()
