"""Answers by a server with OpenAI's interface, such as vLLM's: many requests at a time, repeated where they fail."""

from __future__ import annotations

import json
import logging
import os
import queue
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from http.client import HTTPException
from typing import Any, Literal

from mindspeed_simpo.data.end_of_turn import any_of, special_tokens
from mindspeed_simpo.data.problems import first_line
from mindspeed_simpo.errors import SimpoError
from mindspeed_simpo.studies.sampling.record import Answer, Draw, SamplingPrompt

logger = logging.getLogger(__name__)

KEY_VARIABLE = "OPENAI_API_KEY"
PAUSES_S = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0)
"""Before each repetition of a request that failed."""
_PASSING = frozenset({408, 409, 425, 429, 500, 502, 503, 504})
"""Status codes that another try may get past."""


class ServerError(SimpoError):
    """A server cannot be reached, or answers what cannot be used."""


class ServerGenerator:
    """A client of ``/completions``, or of ``/chat/completions`` where the server renders the prompts.

    A request asks for all answers to a prompt that are missing; a server that gives fewer is asked again, one that
    refuses the request is asked for one answer at a time in OpenAI's own fields.

    Args:
        address: Up to ``/v1``.
        model: Name on the server; None for the only one that it lists.
        form: What is sent: token ids, text or messages.
        draw: How answers are drawn.
        concurrency: Requests at the same time.
        timeout: Longest silence, seconds.
        template_kwargs: Variables for the server's chat template.
        name: Of the model where the server has no list.

    Raises:
        ServerError: where the server cannot be reached, or lists no or several models and none is named.
    """

    def __init__(
        self,
        address: str,
        model: str | None,
        form: Literal["ids", "text", "chat"],
        draw: Draw,
        concurrency: int,
        timeout: float,
        template_kwargs: dict[str, Any] | None,
        name: str,
    ) -> None:
        self._address, self._form, self._draw = address, form, draw
        self._concurrency, self._timeout = concurrency, timeout
        self._template_kwargs = template_kwargs
        self._ends = any_of({str(draw.tokenizer.decode([token])) for token in draw.end_ids})
        self._special = any_of(special_tokens(draw.tokenizer))
        self._plain = False
        self._differs: int | None = None
        self.model = model or self._only_model(name)

    def answers(self, prompts: Sequence[SamplingPrompt], missing: frozenset[int]) -> Iterator[tuple[int, list[Answer]]]:
        """See :class:`~mindspeed_simpo.studies.sampling.record.Generator`.

        Raises:
            ServerError: where a request fails for good.
        """
        waiting: queue.SimpleQueue[SamplingPrompt | None] = queue.SimpleQueue()
        done: queue.SimpleQueue[tuple[int, list[Answer]] | BaseException] = queue.SimpleQueue()
        wanted = [prompt for prompt in prompts if prompt.index in missing]
        for prompt in wanted:
            waiting.put(prompt)

        def work() -> None:
            while (prompt := waiting.get()) is not None:
                try:
                    done.put((prompt.index, self._answers(prompt)))
                except BaseException as error:
                    done.put(error)

        # daemons: a run that is stopped does not wait for answers
        for _ in range(min(self._concurrency, len(wanted))):
            waiting.put(None)
            threading.Thread(target=work, daemon=True).start()
        for _ in wanted:
            result = done.get()
            if isinstance(result, BaseException):
                raise result
            yield result

    def _answers(self, prompt: SamplingPrompt) -> list[Answer]:
        answers: list[Answer] = []
        while len(answers) < self._draw.n:
            plain = self._plain
            wanted = 1 if plain else self._draw.n - len(answers)
            body = self._body(prompt, wanted, self._draw.seed_of(prompt, len(answers)), plain=plain)
            try:
                reply = self._request(self._path, body)
            except _RefusedError as error:
                if plain or error.code not in (400, 422):
                    raise
                # some servers know one answer a request and OpenAI's own fields alone; one that refuses these says why
                self._plain = True
                continue
            self._compare_prompt(prompt, reply)
            answers += [self._answer(choice) for choice in self._choices(reply)[:wanted]]
        return answers

    @property
    def _path(self) -> str:
        return "/chat/completions" if self._form == "chat" else "/completions"

    def _body(self, prompt: SamplingPrompt, wanted: int, seed: int, *, plain: bool) -> dict[str, Any]:
        draw = self._draw
        body: dict[str, Any] = {
            "model": self.model,
            "n": wanted,
            "temperature": draw.temperature,
            "top_p": draw.top_p,
            "max_tokens": prompt.limit,
            "seed": seed,
        }
        if self._form == "chat":
            body["messages"] = prompt.messages
            if prompt.prompt.tools is not None:
                body["tools"] = json.loads(prompt.prompt.tools)
            if self._template_kwargs and not plain:
                body["chat_template_kwargs"] = self._template_kwargs
            return body
        body["prompt"] = list(prompt.ids) if self._form == "ids" else prompt.text
        if plain:
            return body
        # fields of vLLM and others: the ends that training has, and no second BOS before a text that has one
        return body | {"stop_token_ids": sorted(draw.end_ids), "add_special_tokens": False}

    def _choices(self, reply: Any) -> list[Any]:
        choices = reply.get("choices") if isinstance(reply, dict) else None
        if not isinstance(choices, list) or not choices:
            raise ServerError(f"{self._address}{self._path}: no choices in the reply: {json.dumps(reply)[:300]}")
        return choices

    def _answer(self, choice: Any) -> Answer:
        try:
            text = (choice["message"]["content"] or "") if self._form == "chat" else choice["text"]
            cut = choice.get("finish_reason") not in ("stop", None)
        except (KeyError, TypeError, AttributeError):
            text, cut = None, False
        if not isinstance(text, str):
            raise ServerError(f"{self._address}{self._path}: not a choice with text: {json.dumps(choice)[:300]}")
        # some servers leave special tokens in the text
        end = self._ends.search(text)
        return Answer(self._special.sub("", text[: end.start()] if end else text), cut and end is None)

    def _compare_prompt(self, prompt: SamplingPrompt, reply: Any) -> None:
        """Warn once where the server counts other tokens in the prompt than training has."""
        usage = reply.get("usage") if isinstance(reply, dict) else None
        counted = usage.get("prompt_tokens") if isinstance(usage, dict) else None
        if isinstance(counted, int) and counted not in (0, len(prompt.ids)) and self._differs is None:
            self._differs = counted
            logger.warning(
                "%s counts %d tokens in the prompt of %s, training has %d: the server renders or tokenises otherwise "
                "(another chat template, other chat_template_kwargs, a second BOS); --server-prompt ids is exact",
                self._address, counted, prompt.source, len(prompt.ids),
            )  # fmt: skip

    def _only_model(self, name: str) -> str:
        try:
            reply = self._request("/models", None, pauses=())
        except _RefusedError as error:
            if error.code not in (404, 405, 501):
                raise
            return name
        try:
            names = [str(model["id"]) for model in reply["data"]]
        except (KeyError, TypeError):
            names = []
        if len(names) != 1:
            found = ", ".join(names[:20]) or "none"
            raise ServerError(f"{self._address} lists the models {found}: name one with --server-model")
        return names[0]

    def _request(self, path: str, body: Any, pauses: Sequence[float] | None = None) -> Any:
        """The JSON reply to a request, which is repeated where another try may succeed."""
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get(KEY_VARIABLE):
            headers["Authorization"] = f"Bearer {key}"
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self._address + path, data, headers)
        left = list(PAUSES_S if pauses is None else pauses)
        while True:
            error = self._attempt(request)
            if not isinstance(error, ServerError):
                return error
            if not left or (isinstance(error, _RefusedError) and error.code not in _PASSING):
                raise error
            logger.info("%s; again in %g s", error, left[0])
            time.sleep(left.pop(0))

    def _attempt(self, request: urllib.request.Request) -> Any:
        where = request.full_url
        try:
            with urllib.request.urlopen(request, timeout=self._timeout) as reply:
                return json.loads(reply.read())
        except urllib.error.HTTPError as error:
            said = error.read(2000).decode("utf-8", "replace").strip()
            return _RefusedError(
                error.code, f"{where}: HTTP {error.code} {error.reason}: {said[:500]}{self._advice(error)}"
            )
        except (urllib.error.URLError, TimeoutError, ConnectionError, HTTPException) as error:
            reason = getattr(error, "reason", None) or error
            return ServerError(f"{where}: no reply: {reason or type(error).__name__}: is the server running there?")
        except ValueError as error:
            return ServerError(f"{where}: the reply is no JSON: {first_line(error)}")

    def _advice(self, error: urllib.error.HTTPError) -> str:
        if error.code in (401, 403):
            return f" (the key is read from {KEY_VARIABLE})"
        if error.code in (400, 422) and self._form == "ids":
            return " (for a server that takes no token ids: --server-prompt text)"
        if error.code == 404:
            return " (--server is the address up to /v1)"
        return ""


class _RefusedError(ServerError):
    """The server replied with an error."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code
