"""What is built upon those clients: LangChain, instructor, Pydantic AI, and the `llm` command."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel, Field

from tests.e2e.clients.conftest import MODEL, Scripted, run
from tests.e2e.clients.test_openai import DEGREES, Animal
from tests.e2e.conftest import Server


def get_weather(city: str) -> str:
    """The weather in a city."""
    return DEGREES[city]


class TestLangChain:
    @pytest.fixture
    def chat(self, tiny_talker: Server) -> Any:
        return self.model(tiny_talker.url, temperature=0, max_tokens=60)

    def model(self, url: str, **options: Any) -> Any:
        langchain = pytest.importorskip("langchain_openai")
        return langchain.ChatOpenAI(model=MODEL, base_url=f"{url}/v1", api_key="none", max_retries=0, **options)

    def test_whole_and_streamed(self, chat: Any) -> None:
        whole = chat.invoke("Say hello.")
        told = list(chat.stream("Say hello.", stream_usage=True))
        assert whole.content == "".join(chunk.content for chunk in told) != ""
        (usage,) = [chunk.usage_metadata for chunk in told if chunk.usage_metadata]
        assert usage["total_tokens"] == whole.usage_metadata["total_tokens"]

    @pytest.mark.parametrize("method", ["json_schema", "function_calling"])
    def test_structured_output(self, chat: Any, method: str) -> None:
        found = chat.with_structured_output(Animal, method=method).invoke("An animal.")
        assert isinstance(found, Animal)

    def test_json_mode(self, chat: Any) -> None:
        import openai

        asked = 'The animal Tom as JSON, such as {"kind": "cat"}'
        try:
            answer = chat.bind(response_format={"type": "json_object"}, max_tokens=200).invoke(asked)
            assert isinstance(json.loads(answer.content), dict)
        except openai.LengthFinishReasonError:  # of the client, for what this model does not bring to an end
            pass

    @pytest.mark.parametrize("responses", [False, True])
    def test_tools_in_a_loop(self, scripted: Scripted, responses: bool) -> None:
        from langchain_core.messages import HumanMessage, ToolMessage

        chat = self.model(scripted.url, use_responses_api=responses).bind_tools([get_weather])
        messages: list[Any] = [HumanMessage("[script:both] How warm is it?")]
        answer = chat.invoke(messages)
        assert [call["name"] for call in answer.tool_calls] == ["get_weather"] * 2
        messages.append(answer)
        messages += [ToolMessage(get_weather(**call["args"]), tool_call_id=call["id"]) for call in answer.tool_calls]
        chunks = list(chat.stream(messages))
        assert "".join(chunk.text for chunk in chunks) == "18 in Paris, 7 in 北京."

    def test_streamed_calls(self, scripted: Scripted) -> None:
        chat = self.model(scripted.url).bind_tools([get_weather])
        chunks = list(chat.stream("[script:both] How warm is it?"))
        whole = chunks[0]
        for chunk in chunks[1:]:
            whole += chunk
        assert [call["args"] for call in whole.tool_calls] == [{"city": "Paris"}, {"city": "北京"}]

    def test_embeddings(self, tiny_talker: Server) -> None:
        langchain = pytest.importorskip("langchain_openai")
        embed = langchain.OpenAIEmbeddings(
            model=MODEL, base_url=f"{tiny_talker.url}/v1", api_key="none", check_embedding_ctx_length=False
        )
        sea, same, other = embed.embed_documents(["The sea", "The sea", "海"])
        assert sea == pytest.approx(same, abs=1e-3) and sea != pytest.approx(other, abs=1e-3)
        assert embed.embed_query("The sea") == pytest.approx(sea, abs=1e-2)


class TestInstructor:
    @pytest.mark.parametrize("mode", ["TOOLS", "JSON_SCHEMA", "JSON", "MD_JSON"])
    def test_modes(self, tiny_talker: Server, mode: str) -> None:
        instructor = pytest.importorskip("instructor")
        import openai

        base = openai.OpenAI(base_url=f"{tiny_talker.url}/v1", api_key="none", max_retries=0)
        client = instructor.from_openai(base, mode=instructor.Mode[mode])
        options: Any = {"model": MODEL, "messages": [{"role": "user", "content": "An animal."}], "max_tokens": 120}
        if mode in ("TOOLS", "JSON_SCHEMA"):
            assert isinstance(client.create(response_model=Animal, max_retries=0, **options), Animal)
        else:  # where the model has to know what it says, and this one does not
            exceptions = pytest.importorskip("instructor.core.exceptions")
            try:
                assert isinstance(client.create(response_model=Animal, max_retries=1, **options), Animal)
            except (exceptions.InstructorRetryException, exceptions.IncompleteOutputException) as error:
                assert "400" not in str(error) and "Error code" not in str(error)

    def test_what_does_not_validate_is_asked_again(self, scripted: Scripted) -> None:
        instructor = pytest.importorskip("instructor")
        import openai

        base = openai.OpenAI(base_url=f"{scripted.url}/v1", api_key="none", max_retries=0)
        client = instructor.from_openai(base, mode=instructor.Mode.MD_JSON)
        asked: Any = [{"role": "user", "content": "[script:animal] An animal."}]
        animal = client.create(response_model=Animal, max_retries=1, model=MODEL, messages=asked)
        assert (animal.kind, animal.legs) == ("cat", 4)


class TestPydanticAI:
    def model(self, url: str, kind: str = "Chat") -> Any:
        models = pytest.importorskip("pydantic_ai.models.openai")
        providers = pytest.importorskip("pydantic_ai.providers.openai")
        provider = providers.OpenAIProvider(base_url=f"{url}/v1", api_key="none")
        return getattr(models, f"OpenAI{kind}Model")(MODEL, provider=provider)

    @pytest.mark.parametrize("kind", ["Chat", "Responses"])
    def test_text(self, tiny_talker: Server, kind: str) -> None:
        model = self.model(tiny_talker.url, kind)
        from pydantic_ai import Agent

        agent = Agent(model, model_settings={"temperature": 0, "max_tokens": 20})

        async def both() -> tuple[str, str]:
            whole = await agent.run("Say hello.")
            async with agent.run_stream("Say hello.") as stream:
                return whole.output, "".join([text async for text in stream.stream_text(delta=True)])

        whole, streamed = asyncio.run(both())
        assert whole == streamed != ""

    @pytest.mark.parametrize("native", [False, True])
    @pytest.mark.parametrize("kind", ["Chat", "Responses"])
    def test_structured_output(self, tiny_talker: Server, kind: str, native: bool) -> None:
        model = self.model(tiny_talker.url, kind)
        from pydantic_ai import Agent, NativeOutput

        class Answer(BaseModel, extra="forbid"):
            animal: Animal
            sure: bool
            weight: float = Field(ge=0, le=100)

        output: Any = NativeOutput(Answer) if native else Answer
        agent = Agent(model, output_type=output, model_settings={"temperature": 0})
        assert isinstance(agent.run_sync("An animal.").output, Answer)

    @pytest.mark.parametrize("kind", ["Chat", "Responses"])
    def test_tools_in_a_loop(self, scripted: Scripted, kind: str) -> None:
        model = self.model(scripted.url, kind)
        from pydantic_ai import Agent

        agent = Agent(model, tools=[get_weather])
        assert agent.run_sync("[script:both] How warm is it?").output == "18 in Paris, 7 in 北京."

        async def streamed() -> str:
            async with agent.run_stream("[script:both] How warm is it?") as stream:
                return await stream.get_output()

        assert asyncio.run(streamed()) == "18 in Paris, 7 in 北京."


class TestLlm:
    """The command, which reads where its models are from a file."""

    @pytest.fixture
    def llm(self, tmp_path: Path, tiny_talker: Server, scripted: Scripted) -> Any:
        command = shutil.which("llm", path=str(Path(sys.executable).parent)) or shutil.which("llm")
        if command is None:
            pytest.skip("llm is not installed: `make test-clients`")
        rows = "".join(
            f"- model_id: {name}\n  model_name: {MODEL}\n  api_base: {url}/v1\n"
            "  supports_schema: true\n  supports_tools: true\n"
            for name, url in [("small", tiny_talker.url), ("actor", scripted.url)]
        )
        (tmp_path / "extra-openai-models.yaml").write_text(rows)

        def ask(*words: str) -> str:
            environment = {**os.environ, "LLM_USER_PATH": str(tmp_path), "OPENAI_API_KEY": "none"}
            return run(str(command), *words, env=environment).stdout

        return ask

    def test_ask(self, llm: Any) -> None:
        said = llm("-m", "small", "Say hello.", "-o", "temperature", "0", "-o", "max_tokens", "20")
        assert said.strip()
        assert said == llm(
            "-m", "small", "Say hello.", "-o", "temperature", "0", "-o", "max_tokens", "20", "--no-stream"
        )
        assert "smollm2" in llm("logs", "-n", "1", "--json") or said.strip() in llm("logs", "-n", "1", "-r")

    def test_go_on(self, llm: Any) -> None:
        assert llm("-m", "actor", "[script:plain] Hi").strip() == "Hello! 你好 👋"
        assert llm("-c", "[script:plain] Hi again").strip() == "Hello! 你好 👋"

    def test_schema(self, llm: Any) -> None:
        schema = json.dumps(Animal.model_json_schema())
        assert Animal.model_validate_json(llm("-m", "small", "An animal.", "--schema", schema))

    def test_tools(self, llm: Any) -> None:
        function = f"def get_weather(city: str) -> str:\n    'The weather'\n    return {DEGREES!r}[city]\n"
        said = llm("-m", "actor", "--functions", function, "[script:both] How warm is it?", "--chain-limit", "4")
        assert said.strip().endswith("18 in Paris, 7 in 北京.")
