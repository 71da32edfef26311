"""Methods that break one rule each fail in the check of that rule, with words that help."""

import re

import pytest

from flashdreams.checking import rank_checks
from flashdreams.checking.checks import NAMES, check_method
from flashdreams.checking.report import Note
from flashdreams.checking.small import small_pipeline
from flashdreams.checking.subject import new_subject
from flashdreams.infra.config import derive_config
from flashdreams.integrations.matrix_game.config import PIPELINE as MATRIX_GAME
from tests import broken_methods as broken


def result(config, check):
    report = check_method(config, ("rollout", check) if check != "rollout" else ("rollout",))
    return {found.check: found for found in report.results}[check]


NETWORKS = {
    "KeepsTable": ("meta build", "table is a plain attribute"),
    "ForgetsBuffer": ("meta build", "table is not filled"),
    "OnTheHost": ("meta build", "scale is on cpu"),
    "NotFinite": ("rollout", "not finite"),
    "Random": ("determinism", "never from torch.rand"),
    "Remembers": ("interleaving", "keep it in what initialize_cache returns"),
    "CountsCalls": ("state on modules", "CountsCalls.calls"),
    "DefaultType": ("default type", "Pass dtype="),
    "HostTensor": ("devices", "add__ at broken_methods.py|add at broken_methods.py"),
    "SaysCpu": ("devices", "add__ at broken_methods.py|add at broken_methods.py"),
    "SeedsTheProgram": ("determinism", "draws from or seeds a global generator"),
    "InPlace": ("graph safety", "InPlace.forward writes into an input tensor"),
    "Waits": ("graph safety", "__bool__.. at broken_methods.py"),
    "ReadsThePosition": ("graph safety", "broken_methods.py:.* in forward: .* becomes"),
    "Reallocates": ("graph safety", "is at another address in memory"),
    "ExampleWithoutText": ("graph safety", "the warm-up on a GPU fails with ValueError: This"),
    "WrongStyle": ("rollout", 'style "host" and holds a tensor'),
    "ForgetsGather": ("rollout", "needs split, gather, and attention or cores"),
    "LosesState": ("snapshot", "saved and loaded after 3 AR steps continues differently"),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_a_broken_network_fails_on_its_line(name):
    check, words = NETWORKS[name]
    found = result(broken.with_network(getattr(broken, name)), check)
    assert found.verdict == "FAIL"
    assert re.search(words, found.text), found.text


@pytest.mark.parametrize(
    ("config", "check", "words"),
    [
        (broken.BrokenDecoderConfig(), "shapes and frames", "Override frame_count"),
        (broken.BytesDecoderConfig(), "shapes and frames", "x / 127.5 - 1"),
        (broken.ChannelsFirstConfig(), "shapes and frames", "frames before channels"),
        (broken.SeamsConfig(), "chunk split", "seams between chunks"),
        (broken.AveragesConfig(), "bad input", "decoder.mean contain NaN"),
        (broken.AveragesConfig(), "state on modules", "Averages.mean"),
    ],
)
def test_a_broken_decoder_fails_on_its_line(config, check, words):
    found = result(broken.with_decoder(config), check)
    assert found.verdict == "FAIL" and words in found.text, found.text


def test_a_config_that_changes_itself_fails():
    pipeline = {"diffusion_model": {"transformer": broken.GrowingConfig()}}
    found = result(derive_config(broken.WHOLE, pipeline=pipeline), "config round trip")
    assert found.verdict == "FAIL"
    assert "pipeline.diffusion_model.transformer.grown" in found.text


def test_control_that_nobody_checks_fails():
    encoder = broken.PlaceEncoderConfig(_target=broken.AcceptsAnything)
    found = result(derive_config(broken.WHOLE, pipeline={"encoder": encoder}), "bad input")
    assert found.verdict == "FAIL" and "an object() as control input is accepted" in found.text


def test_state_without_a_style_is_a_note():
    config = broken.with_network(broken.NoStyle)
    for check in ("state styles", "snapshot"):
        found = result(config, check)
        assert found.verdict == "note" and "PlainPrompt.extra" in found.text


@pytest.mark.parametrize(
    ("name", "words"),
    [("IgnoresPrompt", "depend on the prompt:"), ("IgnoresKeys", "depend on the commands:")],
)
def test_ignored_input_is_a_note(name, words):
    found = result(broken.with_network(getattr(broken, name)), "inputs")
    assert found.verdict == "note" and words in found.text, found.text


def test_a_network_for_float32_alone_fails_if_it_is_registered_in_bfloat16():
    config = broken.with_network(broken.AssumesFloat32)
    found = result(config, "bfloat16")
    assert found.verdict == "note" and "the same dtype" in found.text
    typed = {"diffusion_model": {"transformer": {"dtype": "bfloat16"}}}
    assert result(derive_config(config, pipeline=typed), "bfloat16").verdict == "FAIL"


def test_a_control_that_the_warm_up_does_not_have_is_a_note():
    found = result(broken.with_network(broken.ExampleOfOneToken), "graph safety")
    assert found.verdict == "note"
    assert "control of the warm-up has the shapes [[1, 1, 64]], that of" in found.text, found.text


def test_values_that_overflow_are_a_note():
    found = result(broken.with_network(broken.Overflows), "large noise")
    assert found.verdict == "note" and "latents that are not finite" in found.text


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("ForgetsSplit", "The plan leaves out 'rope'"),
        ("ForgetsCore", "The plan leaves out the attention core 'blocks.*.attention.core'"),
        ("SeesPart", "No single addition to the plan fixes it"),
    ],
)
@pytest.mark.slow
def test_two_ranks_say_what_the_plan_leaves_out(name, words):
    found = result(broken.with_network(getattr(broken, name)), "two ranks")
    assert found.verdict == "FAIL" and words in found.text, found.text


def test_heads_that_no_plan_counts_are_a_note(monkeypatch, tmp_path):
    ran = rank_checks.Ranks([], {}, None)
    monkeypatch.setattr(rank_checks, "_run", lambda *rest: ran)  # the ranks are another test's
    subjects = {
        kind: new_subject(broken.with_network(kind), tmp_path)
        for kind in (broken.GathersHeads, broken.SharesHeads)
    }
    subject = subjects[broken.GathersHeads]
    with pytest.raises(Note, match=r"all heads of 'blocks\.1\.attention\.core': give their number"):
        rank_checks.check_ranks(subject, subject.open())
    subject = subjects[broken.SharesHeads]
    assert rank_checks.check_ranks(subject, subject.open()).endswith("nothing to split")


def test_the_example_passes_every_check_but_those_of_ranks():
    """Negative control of the whole file."""
    report = check_method(broken.WHOLE, tuple(n for n in NAMES if n != "two ranks"))
    assert report.passed and all(r.verdict == "pass" for r in report.results), str(report)


def test_example_keys_that_a_method_does_not_have_are_left_out(tmp_path):
    methods = [
        kind(runner_name="keys", pipeline=broken.WHOLE.pipeline, actions="")
        for kind in (broken.OtherKeysConfig, type(broken.WHOLE))
    ]
    assert [bool(new_subject(m, tmp_path).config.actions) for m in methods] == [False, True]


def test_sizes_that_follow_from_others_are_scaled_with_them():
    small = small_pipeline(MATRIX_GAME).config.diffusion_model.transformer
    assert (small.num_layers, small.action_blocks, small.text_dim) == (2, 1, 0)


def test_an_unknown_check_is_refused():
    with pytest.raises(ValueError, match=r"Unknown check 'speed'\. Checks: config round trip"):
        check_method(broken.WHOLE, ("speed",))
