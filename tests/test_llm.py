"""The offline API on the default model."""

from __future__ import annotations

import asyncio
import gc
import signal
from concurrent.futures import ThreadPoolExecutor
from itertools import zip_longest
from pathlib import Path

import pytest

from ingle import LLM, SamplingParams
from ingle.errors import ConfigError, RequestError
from ingle.request import EngineOutput, RequestOutput
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
    with pytest.raises(ConfigError, match="--rope-scaling: rope factor is 0"):
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


def test_a_question_returns_reply_and_history_in_the_form_it_came(llm: LLM) -> None:
    reply, history = llm.chat("你好", history=None, sampling_params=GREEDY)
    asked = {"temperature": 0.0, "max_tokens": 8}
    assert llm.chat(llm.get_tokenizer(), "你好", history=[], **asked) == (reply, history)
    assert llm.chat(query="你好", history=None, do_sample=False, max_new_tokens=8) == (reply, history)
    assert llm.chat("你好", GREEDY)[0] == reply
    answer, pairs = llm.chat(None, "And now?", [("你好", reply)], **asked)
    assert pairs == [("你好", reply), ("And now?", answer)]
    assert llm.chat("And now?", history, GREEDY)[0] == answer
    assert "".join(llm.stream_chat("And now?", GREEDY, history=pairs[:1])) == answer


def test_messages_return_outputs_as_in_vllm(llm: LLM, capsys: pytest.CaptureFixture[str]) -> None:
    question = [{"role": "user", "content": "你好"}]
    reply = llm.chat("你好", sampling_params=GREEDY)[0]
    (output,) = llm.chat(question, GREEDY, use_tqdm=False)
    assert isinstance(output, RequestOutput) and output.outputs[0].text == reply
    assert output.prompt is not None and output.prompt.endswith("<|im_start|>assistant\n")
    other = [{"role": "system", "content": "Answer in English."}, *question]
    one, two = llm.chat(messages=[question, other], sampling_params=[GREEDY, GREEDY], use_tqdm=False)
    assert one.outputs == output.outputs and "Answer in English." in str(two.prompt)
    assert "Answer in English." in str(llm.chat(question, system="Answer in English.", max_tokens=1, use_tqdm=False))
    (bare,) = llm.chat(question, GREEDY, add_generation_prompt=False, use_tqdm=False)
    assert not str(bare.prompt).endswith("assistant\n")
    (own,) = llm.chat(question, GREEDY, chat_template="Q: {{ messages[0].content }}", use_tqdm=False)
    assert own.prompt == "Q: 你好" and capsys.readouterr().out == ""


def test_dict_prompts_and_token_ids_by_name(llm: LLM) -> None:
    text = "The capital of France is"
    ids = llm.get_tokenizer().encode(text)
    (wanted,) = llm.generate(text, GREEDY, use_tqdm=False)
    prompts = [{"prompt": text}, {"prompt_token_ids": ids}, text]
    for output in llm.generate(prompts, GREEDY, use_tqdm=False):
        assert output.outputs == wanted.outputs
    for given in (ids, [ids]):
        (output,) = llm.generate(prompt_token_ids=given, sampling_params=GREEDY, use_tqdm=False)
        assert output.outputs == wanted.outputs
    assert llm.generate({"prompt": text}, GREEDY, use_tqdm=False)[0].prompt == text


def test_the_tokenizer_as_vllms_users_take_it(llm: LLM) -> None:
    tokenizer, messages = llm.get_tokenizer(), [{"role": "user", "content": "Hi"}]
    prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert prompt == llm.chat(messages, GREEDY, use_tqdm=False)[0].prompt
    ids = tokenizer.apply_chat_template([messages], add_generation_prompt=True)[0]
    assert ids == tokenizer(prompt, add_special_tokens=False)["input_ids"] and tokenizer.decode(ids) == prompt
    assert (
        tokenizer.convert_tokens_to_ids("<|im_end|>") == tokenizer.eos_token_id == tokenizer.get_vocab()["<|im_end|>"]
    )
    assert tokenizer.convert_ids_to_tokens([tokenizer.eos_token_id]) == ["<|im_end|>"]
    assert len(tokenizer) == tokenizer.vocab_size == 49152 and tokenizer.batch_decode([ids]) == [prompt]
    with pytest.raises(RequestError, match="return_tensors='pt'"):
        tokenizer("Hi", return_tensors="pt")
    with pytest.raises(AttributeError, match=r"AutoTokenizer\.from_pretrained"):
        _ = tokenizer.push_to_hub


@pytest.mark.parametrize(
    ("said", "named", "words"),
    [
        ((), {}, "give one question"),
        (("a",), {"messages": [{}]}, "give one question"),
        (([{"role": "user", "content": "a"}],), {"history": [("a", "b")]}, "messages are the whole conversation"),
        (("a", ["b"]), {}, "history holds 'b'"),
        (("a",), {"history": 5}, "history is a int"),
        ((["a"],), {}, "'a'\\] is no conversation"),
        (([],), {}, "is no conversation"),
        (("a",), {"max_length": 5}, "give max_tokens"),
        (("a",), {"temprature": 5}, "do you mean temperature"),
        (("a",), {"temperature": -5}, "temperature must be"),
        (("a",), {"tools": [len]}, "each tool is an object"),
        (("a",), {"num_beams": 4}, "num_beams=4"),
        (("a",), {"sampling_params": {"temperature": 0}}, "sampling_params is a dict"),
        (([{"role": "user", "content": "a"}],), {"sampling_params": [GREEDY] * 2}, "1 prompts and 2 sampling_params"),
    ],
)
def test_a_call_that_cannot_be_read_is_refused_by_name(tiny: LLM, said: tuple, named: dict, words: str) -> None:
    with pytest.raises(RequestError, match=words):
        tiny.chat(*said, **named)


def test_tools_and_a_message_that_goes_on(tiny: LLM) -> None:
    """As in vLLM's class the text of an answer is left as it is."""
    tool = {"type": "function", "function": {"name": "weather", "description": "", "parameters": {}}}
    (output,) = tiny.chat([{"role": "user", "content": "a"}], tools=[tool], max_tokens=1, use_tqdm=False)
    assert output.prompt is not None and '"name": "weather"' in output.prompt
    begun = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "so we"}]
    template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    (output,) = tiny.chat(begun, continue_final_message=True, chat_template=template, max_tokens=1, use_tqdm=False)
    assert output.prompt == "<user>a<assistant>so we"
    options = {"chat_template": template, "tokenize": False}
    tokenizer = tiny.get_tokenizer()
    assert tokenizer.apply_chat_template(begun, continue_final_message=True, **options) == output.prompt
    assert "weather" in tokenizer.apply_chat_template(begun, tools=[tool], **options)


def test_what_vllms_class_has_beside(tiny: LLM) -> None:
    for name, words in (("llm_engine", "llm.engine"), ("encode", "get_tokenizer"), ("embed", "embedding models")):
        with pytest.raises(AttributeError, match=words):
            getattr(tiny, name)
    assert not hasattr(tiny, "anything_else")
    assert tiny.get_default_sampling_params() == SamplingParams()


def test_what_happens_while_a_model_is_loaded_is_told(tmp_path: Path) -> None:
    folder, told = save_checkpoint(tmp_path / "model", vocab_size=420), []
    toys.byte_level().save(str(folder / "tokenizer.json"))
    LLM(str(folder), device="cpu", dtype="float32", kv_cache_memory="8MiB", report=told.append)
    assert told[0] == "reading the tokenizer"
    assert any("loading weights" in stage for stage in told)


def test_an_answer_is_stopped_from_a_signal_handler(tiny: LLM) -> None:
    """As it happens amid a step."""
    stream = tiny.chat_events(ask("Hello"), LONG)
    step, previous = tiny.engine.step, signal.signal(signal.SIGINT, lambda number, frame: stream.close())

    def interrupted() -> list[EngineOutput]:
        signal.raise_signal(signal.SIGINT)
        return step()

    tiny.engine.step = interrupted  # type: ignore[method-assign]
    try:
        assert list(stream) == []
    finally:
        del tiny.engine.step
        signal.signal(signal.SIGINT, previous)
    assert idle(tiny)


def test_closing_a_stream_stops_the_generation(llm: LLM) -> None:
    stream = llm.stream_chat([{"role": "user", "content": "Count to a hundred."}])
    next(stream)
    stream.close()  # type: ignore[attr-defined]
    assert not llm.engine.has_work
    llm.engine.scheduler.check()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> LLM:
    folder = save_checkpoint(tmp_path_factory.mktemp("tiny"), vocab_size=420)
    toys.byte_level().save(str(folder / "tokenizer.json"))
    options = {"device": "cpu", "dtype": "float32", "kv_cache_memory": "8MiB"}
    return LLM(str(folder), chat_template="{{ messages[0].content }}", **options)


LONG = SamplingParams(temperature=0.0, max_tokens=30, ignore_eos=True)


def alone(llm: LLM, text: str) -> str:
    return llm.chat(text, sampling_params=LONG)[0]


def idle(llm: LLM) -> bool:
    llm.engine.scheduler.check()
    return not llm.engine.has_work


def ask(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def test_generate_within_the_loop_over_a_stream(tiny: LLM) -> None:
    wanted, pieces, others = alone(tiny, "Hello"), [], []
    for piece in tiny.stream_chat(ask("Hello"), LONG):
        pieces.append(piece)
        others.append(tiny.generate(f"Number {len(others) % 3}", GREEDY, use_tqdm=True)[0].outputs[0].token_ids)
    assert "".join(pieces) == wanted and idle(tiny)
    for index, token_ids in enumerate(others):
        assert token_ids == others[index % 3] and len(token_ids) == 8


def test_two_streams_in_turn(tiny: LLM) -> None:
    texts = ["one", "two"]
    streams = [tiny.stream_chat(ask(text), LONG) for text in texts]
    pieces = list(zip_longest(*streams, fillvalue=""))
    assert ["".join(own) for own in zip(*pieces, strict=True)] == [alone(tiny, text) for text in texts]
    assert idle(tiny)


def test_a_stream_that_is_left_holds_nobody_up(tiny: LLM) -> None:
    stream = tiny.stream_chat(ask("left"), LONG)
    first = next(stream)
    assert alone(tiny, "other")
    assert first + "".join(stream) == alone(tiny, "left"), "what came meanwhile was kept"
    left = tiny.stream_chat(ask("left"), LONG)
    next(left)
    del left
    assert idle(tiny)


def test_many_threads(tiny: LLM) -> None:
    wanted = {f"thread {i}": alone(tiny, f"thread {i}") for i in range(6)}
    most, step = [0], tiny.engine.step

    def noted() -> list[EngineOutput]:
        most[0] = max(most[0], len(tiny.engine.scheduler.running))
        return step()

    def run(text: str) -> str:
        if text[-1] in "05":
            return alone(tiny, text)
        if text[-1] == "1":  # given up on the way
            next(tiny.stream_chat(ask(text), LONG))
        (output,) = tiny.generate(text, LONG)
        return output.outputs[0].text

    tiny.engine.step = noted  # type: ignore[method-assign]
    try:
        with ThreadPoolExecutor(6) as pool:
            for _ in range(3):
                assert list(pool.map(run, wanted)) == list(wanted.values())
    finally:
        del tiny.engine.step
    assert most[0] > 1, "they shared steps"
    assert idle(tiny) and gc.get_threshold()[2] < 1_000_000


def test_in_asyncio(tiny: LLM) -> None:
    async def both() -> list[list[RequestOutput]]:
        calls = (asyncio.to_thread(tiny.generate, text, LONG) for text in ("a", "b"))
        return await asyncio.gather(*calls)

    (one,), (two,) = asyncio.run(both())
    assert [one.outputs[0].text, two.outputs[0].text] == [alone(tiny, "a"), alone(tiny, "b")]


def test_a_request_that_is_refused_leaves_nothing_behind(tiny: LLM) -> None:
    params = [LONG, SamplingParams(logit_bias={419: 1.0, 9999: 1.0})]
    with pytest.raises(RequestError, match="prompt 1: logit_bias names token 9999"):
        tiny.generate(["a", "b"], params, use_tqdm=False)
    assert idle(tiny) and tiny.generate("a", GREEDY, use_tqdm=False)


@pytest.mark.parametrize("prompt", ["The capital of France is", "naïve 你好", "end\n"])
def test_a_prompt_and_its_text_are_what_all_tokens_decode_to(tiny: LLM, llm: LLM, prompt: str) -> None:
    for model in (tiny, llm):
        (output,) = model.generate(prompt, GREEDY, use_tqdm=False)
        token_ids = [*output.prompt_token_ids, *output.outputs[0].token_ids]
        assert prompt + output.outputs[0].text == model.tokenizer.decode(token_ids)


def test_a_prompt_is_scored_without_an_answer(tiny: LLM) -> None:
    (output,) = tiny.generate("Hello", SamplingParams(max_tokens=0, prompt_logprobs=0), use_tqdm=False)
    assert output.prompt_logprobs is not None and len(output.prompt_logprobs) == len(output.prompt_token_ids)
    assert (output.outputs[0].token_ids, output.outputs[0].finish_reason) == ([], "length")


def test_a_bad_prompt_stops_the_whole_call_before_it_runs(llm: LLM) -> None:
    for prompt in (5, {"prompt": 5}, [{"prompt_token_ids": 1.0}]):
        with pytest.raises(RequestError, match="give text"):
            llm.generate(prompt)  # type: ignore[arg-type]
    for bad, words in (({"prompt": "x", "multi_modal_data": {}}, "multi_modal_data"), ({}, "is empty")):
        with pytest.raises(RequestError, match=words):
            llm.generate(bad)
    with pytest.raises(RequestError, match="prompt 1: token id -1 is not in the model's vocabulary"):
        llm.generate([[1], [-1]])
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
