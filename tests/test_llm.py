"""The offline API on the default model."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest

from ingle import LLM, SamplingParams
from ingle.errors import ModelError, RequestError
from ingle.request import EngineOutput
from tests.support import save_checkpoint
from tests.text import toys


@pytest.fixture(scope="module")
def llm(smollm2_gguf: Path) -> LLM:
    return LLM(str(smollm2_gguf), dtype="float32", kv_cache_memory="256MiB", max_model_len=512)


GREEDY = SamplingParams(temperature=0.0, max_tokens=8)


def test_results_come_in_the_order_of_the_prompts(llm: LLM, capsys: pytest.CaptureFixture[str]) -> None:
    prompts = ["The capital of France is", "One, two, three,", "The capital of France is"]
    outputs = llm.generate(prompts, GREEDY, use_tqdm=False)
    assert [output.prompt for output in outputs] == prompts
    assert outputs[0].outputs[0].text.startswith(" Paris") and outputs[2].outputs[0] == outputs[0].outputs[0]
    assert capsys.readouterr().out == ""


def test_no_full_garbage_collection_stops_a_batch(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    before, step, during = gc.get_threshold(), llm.engine.step, set()

    def spied_step() -> list[EngineOutput]:
        during.add(gc.get_threshold())
        return step()

    monkeypatch.setattr(llm.engine, "step", spied_step)
    llm.generate("One, two,", GREEDY, use_tqdm=False)
    assert [(young, middle) for young, middle, _ in during] == [before[:2]] and min(during)[2] >= 1_000_000
    assert gc.get_threshold() == before


def test_rope_scaling_may_be_a_dict(smollm2_gguf: Path) -> None:
    llm = LLM(str(smollm2_gguf), kv_cache_memory="64MiB", rope_scaling={"rope_type": "dynamic", "factor": 2.0})
    assert "rope scaling dynamic" not in str(llm.info.notices), "memory cut the context below the model's own"
    with pytest.raises(ModelError, match="--rope-scaling: rope factor is 0"):
        LLM(str(smollm2_gguf), rope_scaling={"rope_type": "dynamic", "factor": 0})


def test_text_and_token_ids_give_the_same(llm: LLM) -> None:
    text = "The capital of France is"
    ids = llm.tokenizer.encode(text)
    by_text, by_ids = llm.generate([text, ids], GREEDY, use_tqdm=False)
    assert (
        by_text.outputs[0].text
        == by_ids.outputs[0].text
        == llm.generate(ids, GREEDY, use_tqdm=False)[0].outputs[0].text
    )
    assert by_ids.prompt is None and by_ids.prompt_token_ids == ids


def test_stop_strings_end_the_text_and_free_the_engine(llm: LLM) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=100, stop=("four",), ignore_eos=True)
    (output,) = llm.generate("One, two, three,", params, use_tqdm=False)
    assert output.outputs[0].stop_reason == "four" and "four" not in output.outputs[0].text
    assert not llm.engine.has_work


def test_n_completions_and_their_seeds(llm: LLM) -> None:
    params = SamplingParams(n=3, seed=5, max_tokens=8)
    first, again = (llm.generate("The", params, use_tqdm=False)[0].outputs for _ in range(2))
    assert [o.text for o in first] == [o.text for o in again] and len({o.text for o in first}) > 1


def test_a_conversation_goes_on(llm: LLM) -> None:
    reply, history = llm.chat("你好", history=None, sampling_params=GREEDY)
    assert history == [{"role": "user", "content": "你好"}, {"role": "assistant", "content": reply}]
    _, history = llm.chat("And now?", history, GREEDY)
    assert [message["role"] for message in history] == ["user", "assistant"] * 2


def test_closing_a_stream_stops_the_generation(llm: LLM) -> None:
    stream = llm.stream_chat([{"role": "user", "content": "Count to a hundred."}])
    next(stream)
    stream.close()  # type: ignore[attr-defined]
    assert not llm.engine.has_work
    llm.engine.scheduler.check()


def test_a_bad_prompt_stops_the_whole_call_before_it_runs(llm: LLM) -> None:
    for prompt in (5, {"prompt": "x"}, [{"prompt_token_ids": [1]}]):
        with pytest.raises(RequestError, match="give text"):
            llm.generate(prompt)
    with pytest.raises(RequestError, match="prompt 1: token id -1 is not in the model's vocabulary"):
        llm.generate([[1], [-1]])
    with pytest.raises(RequestError, match="sampling_params="):
        llm.chat("Hello", SamplingParams(max_tokens=3))
    with pytest.raises(RequestError, match="maximum context length is 512"):
        llm.generate(["fine", [5] * 600], GREEDY, use_tqdm=False)
    assert not llm.engine.has_work


def test_what_the_user_should_know_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A model that transformers' code runs, end to end."""
    folder = save_checkpoint(tmp_path / "model", "olmo2", vocab_size=420)
    toys.byte_level().save(str(folder / "tokenizer.json"))
    options = {"device": "cpu", "dtype": "float32", "kv_cache_memory": "8MiB"}
    llm = LLM(str(folder), chat_template="{{ messages[0].content }}", **options)
    assert "notice: model_type 'olmo2' has no implementation of ingle's own" in caplog.text
    one, two = llm.generate(["Hello", "The quick brown fox"], GREEDY, use_tqdm=False)
    assert llm.generate("Hello", GREEDY, use_tqdm=False)[0].outputs == one.outputs
    assert len(two.outputs[0].token_ids) == 8
    reply, _ = llm.chat("Hello", sampling_params=GREEDY)
    assert reply == one.outputs[0].text
