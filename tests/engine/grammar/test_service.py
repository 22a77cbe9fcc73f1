"""The grammar service with the real compiler, over a real tokeniser."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from engine.errors import RequestError
from engine.grammar.service import GrammarService
from engine.ipc.wire import CancelRequest, Step, SubmitRequest
from engine.request import Grammar, Request, SamplingParams
from engine.text.tokenizer import Tokenizer
from tests.engine.child import Child, engine
from tests.engine.conftest import VOCABULARY

PHONE = Grammar("regex", r"\d{3}-\d{4}")
SCHEMA = {
    "type": "object",
    "properties": {
        "shield": {"type": "boolean"},
        "ranks": {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 9}, "maxItems": 4},
        "kind": {"enum": ["hoplite", "sarissa"]},
    },
    "required": ["shield", "ranks", "kind"],
}
SPEAR = Grammar("json_schema", json.dumps(SCHEMA))


@pytest.fixture(scope="module")
def tokenizer(model_dir: Path) -> Tokenizer:
    return Tokenizer(str(model_dir))


@pytest.fixture(scope="module")
def grammars(model_dir: Path) -> Iterator[GrammarService]:
    grammars = GrammarService(str(model_dir), VOCABULARY, (0,))
    yield grammars
    grammars.close()


@pytest.fixture(scope="module")
def ready(model_dir: Path) -> Iterator[Child]:
    with engine(model_dir) as process:
        yield process


def asking(grammar: Grammar, **fields: object) -> Request:
    return Request("r", (1,), SamplingParams(grammar=grammar), **fields)  # type: ignore[arg-type]


def allowed(mask: bytes) -> set[int]:
    bits = int.from_bytes(mask, "little")
    return {token for token in range(VOCABULARY) if bits >> token & 1}


@pytest.mark.parametrize(
    ("grammar", "text"),
    [
        (PHONE, "555-0199"),
        (SPEAR, '{"shield": true, "ranks": [1,2], "kind": "sarissa"}'),
        (Grammar("json_object"), '{"a": [1, {"b": null}]}'),
        (Grammar("choice", json.dumps(["no", 'a "b"\n🙂'])), 'a "b"\n🙂'),
    ],
)
def test_an_output_is_followed_to_its_end(
    grammars: GrammarService, tokenizer: Tokenizer, grammar: Grammar, text: str
) -> None:
    follow = grammars.follow(asking(grammar))
    assert follow is not None
    matcher, ids = follow(()), tokenizer.encode(text)
    for at, token in enumerate(ids):
        assert matcher.finish is None
        assert token in allowed(matcher.mask())
        assert matcher.mask() == follow(ids[:at]).mask(), "a replay stands where the lost attempt stood"
        matcher.accept(token)
    assert allowed(matcher.mask()) >= {0}
    matcher.accept(0)
    assert matcher.finish == "stop"
    assert follow((*ids, 0)).finish == "stop"


def test_strings_of_limited_length_hold_no_control_characters(
    grammars: GrammarService, tokenizer: Tokenizer
) -> None:
    follow = grammars.follow(asking(Grammar("json_schema", '{"type": "string", "maxLength": 3}')))
    assert follow is not None
    (legal,), (control,) = tokenizer.encode("é")[:1], tokenizer.encode("\x0e")
    within = allowed(follow(tokenizer.encode('"a')).mask())
    assert legal in within
    assert control not in within
    assert allowed(follow(tokenizer.encode('"abc')).mask()) == set(tokenizer.encode('"'))


def test_stop_ids_end_an_output_only_where_the_grammar_may_end(
    grammars: GrammarService, tokenizer: Tokenizer
) -> None:
    (stop,) = tokenizer.encode("x")
    follow = grammars.follow(asking(PHONE, stop_token_ids=(stop,)))
    assert follow is not None
    assert not allowed(follow(tokenizer.encode("555-")).mask()) & {0, stop}
    assert allowed(follow(tokenizer.encode("555-0199")).mask()) == {0, stop}


@pytest.mark.parametrize(
    ("grammar", "why"),
    [
        (Grammar("regex", "(a"), "parenthesis is not closed"),
        (Grammar("regex", r"(a)\1"), "Backreference"),
        (Grammar("regex", "a" * 70_000), "65536 bytes"),
        (Grammar("json_schema", '{"type": "array", "uniqueItems": true}'), "'uniqueItems'"),
        (Grammar("json_schema", '{"$ref": "#/nowhere"}'), "nowhere"),
        (Grammar("json_object", "{}"), "no source"),
        (Grammar("choice", "[]"), "texts"),
        (Grammar("choice", '["a", 3]'), "texts"),
        (Grammar("choice", "[" * 60_000), "texts"),
        (Grammar("choice", '["\\ud800"]'), "surrogates"),
        (Grammar("regex", "\ud800"), "surrogates"),
    ],
)
def test_what_cannot_be_followed_is_refused_with_the_reason(
    grammars: GrammarService, grammar: Grammar, why: str
) -> None:
    with pytest.raises(RequestError) as caught:
        grammars.follow(asking(grammar))
    assert caught.value.reason == "INVALID_GRAMMAR"
    assert why in caught.value.message
    assert "cpp" not in caught.value.message


def test_refused_grammars_take_no_memory(grammars: GrammarService) -> None:
    """A client may send any number of them, and the source of each may have megabytes."""
    before = len(grammars._verdicts)
    for number in range(5):
        with pytest.raises(RequestError, match="bytes"):
            grammars.follow(asking(Grammar("regex", str(number) * 70_000)))
    assert len(grammars._verdicts) == before


def test_prior_output_that_does_not_follow_is_refused(grammars: GrammarService, tokenizer: Tokenizer) -> None:
    follow = grammars.follow(asking(PHONE))
    assert follow is not None
    with pytest.raises(RequestError) as caught:
        follow(tokenizer.encode("shield"))
    assert caught.value.reason == "INVALID_GRAMMAR"


def test_a_model_without_end_needs_a_stop_id(grammars: GrammarService, model_dir: Path) -> None:
    endless = GrammarService(str(model_dir), VOCABULARY, ())
    endless._verdicts = grammars._verdicts
    with pytest.raises(RequestError, match="stop token id"):
        endless.follow(asking(PHONE))
    assert endless.follow(asking(PHONE, stop_token_ids=(5,))) is not None
    endless.close()


def test_without_the_library_a_grammar_is_refused_as_unavailable(
    model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "xgrammar", None)
    grammars = GrammarService(str(model_dir), VOCABULARY, (0,))
    with pytest.raises(RequestError) as caught:
        grammars.follow(asking(PHONE))
    assert caught.value.reason == "GRAMMAR_UNAVAILABLE"
    grammars.close()


def test_a_grammar_that_ends_its_compiler_is_refused_and_the_next_one_is_not(
    grammars: GrammarService,
) -> None:
    grammars.follow(asking(PHONE))
    assert grammars._compiler is not None
    assert grammars._compiler._process is not None
    grammars._compiler._process.kill()
    with pytest.raises(RequestError) as caught:
        grammars.follow(asking(Grammar("regex", "too much")))
    assert caught.value.reason == "GRAMMAR_TOO_COMPLEX"
    assert grammars.follow(asking(Grammar("regex", "not too much"))) is not None


def test_others_go_on_while_a_grammar_is_compiled(ready: Child) -> None:
    """Must be the first test that uses the engine: no compiler process runs yet."""
    ready.send(
        SubmitRequest(Request("slow", (1,), SamplingParams(grammar=PHONE), max_tokens=4)),
        SubmitRequest(Request("fast", (1,), SamplingParams(0.0), max_tokens=4, ignore_eos=True)),
        SubmitRequest(Request("dropped", (1,), SamplingParams(grammar=SPEAR), max_tokens=4)),
        CancelRequest("dropped"),
        SubmitRequest(Request("bad", (1,), SamplingParams(grammar=Grammar("regex", "(")), max_tokens=4)),
    )
    happened: list[str] = []
    while not {"finish slow", "refuse bad INVALID_GRAMMAR"} <= set(happened):
        step = ready.expect(Step)
        happened += [f"accept {id}" for id in step.accepted]
        happened += [f"refuse {refusal.id} {refusal.reason}" for refusal in step.failed]
        happened += [f"finish {delta.id}" for delta in step.deltas if delta.finish]
    assert happened.index("finish fast") < happened.index("accept slow")
    assert not any("dropped" in event for event in happened)


def test_every_choice_matches_and_is_continued_alike(ready: Child, tokenizer: Tokenizer) -> None:
    sampling = SamplingParams(1.0, seed=4, grammar=SPEAR, repetition_penalty=1.2, logit_bias=((10, -9.0),))
    whole = ready.run(Request("whole", (1, 2, 3), sampling, max_tokens=300, n=2))
    outputs = [[t for d in whole if d.choice == choice for t in d.token_ids] for choice in (0, 1)]
    assert outputs[0] != outputs[1]
    assert [delta.finish for delta in whole if delta.finish] == ["stop", "stop"]
    for output in outputs:
        value = json.loads(tokenizer.decode(output))
        assert value.keys() == {"shield", "ranks", "kind"}
        assert isinstance(value["shield"], bool)
        assert value["kind"] in ("hoplite", "sarissa")
        assert len(value["ranks"]) <= 4
        assert all(0 <= rank <= 9 for rank in value["ranks"])
    prior = (tuple(outputs[0][:7]), tuple(outputs[1][:-1]))
    rest = ready.run(Request("rest", (1, 2, 3), sampling, max_tokens=300, n=2, prior=prior))
    for choice in (0, 1):
        continued = [t for delta in rest if delta.choice == choice for t in delta.token_ids]
        assert [*prior[choice], *continued] == outputs[choice]


def test_the_grammars_end_ends_an_output_that_ignores_the_end_of_sequence(
    ready: Child, tokenizer: Tokenizer
) -> None:
    request = Request("e", (1, 2), SamplingParams(0.0, grammar=PHONE), max_tokens=40, ignore_eos=True)
    deltas = ready.run(request)
    assert deltas[-1].finish == "stop"
    assert re.fullmatch(PHONE.source, tokenizer.decode([t for d in deltas for t in d.token_ids]))
