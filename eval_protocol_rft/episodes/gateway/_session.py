"""One agent's rollout: its calls, answered one by one and kept as a tree.

Invariant: every completion that was sampled for a session is in its trajectory, whatever became of
the agent, and no other session sees it. A call that a client sends again because it never had its
answer gets the completion that was sampled for it. A call that fails changes nothing.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

import msgspec

from eval_protocol_rft import rollout, sampling
from eval_protocol_rft.episodes._rendering import ChatText, ConversationError
from eval_protocol_rft.episodes._turns import answered
from eval_protocol_rft.episodes.gateway._call import CallError, ModelCall, Reply, ReplyChoice
from eval_protocol_rft.episodes.gateway._pending import PendingCall, PendingCalls
from eval_protocol_rft.episodes.gateway._settings import (
    Asked,
    Departure,
    SessionSettings,
    settings_of,
)
from eval_protocol_rft.episodes.gateway._trajectory import SessionLog, SessionRecord
from eval_protocol_rft.episodes.gateway._tree import CallTree, Node, Place
from eval_protocol_rft.local import LoadedTokenizer

Sample = Callable[
    [sampling.TokenIds, sampling.SamplingParams, int | None],
    Awaitable[sampling.Survivor | sampling.Failure],
]
"""Prompt, parameters and seed in; what came of it out."""


CONTEXT = "context"
"""Stop reason of a session whose last call had no room in the model's context."""
KEY_MARK = "@"
"""Between the name of a model and the key of a session."""


class Session:
    """Made by `Gateway.session`. An agent is given `base_url` (or `anthropic_url`) and `api_key`,
    and nothing else.

    Args:
        name: for the record's reader.
        settings: how calls are answered.
        tokenizer: the model's.
        sample: gets a completion.
        seed: what the seeds of all completions are derived from; None: they have none.
        salt: makes the ids of calls and replies, so that they are the same in a run that is
            repeated.
        chats: see `CallTree`.
    """

    def __init__(
        self,
        name: str,
        *,
        settings: SessionSettings,
        tokenizer: LoadedTokenizer,
        sample: Sample,
        seed: int | None,
        salt: str,
        chats: dict[str, ChatText] | None = None,
    ) -> None:
        self.name, self.settings = name, settings
        self.base_url = self.anthropic_url = self.api_key = ""
        self.shared_url = self.shared_key = ""
        """Of all sessions of the gateway, for clients that say `model_name` as their model."""
        self._tokenizer, self._sample, self._seed, self._salt = tokenizer, sample, seed, salt
        self._tree = CallTree(tokenizer, on_rewrite=settings.on_rewrite, chats=chats)
        self._pending = PendingCalls()
        self._slots = asyncio.Semaphore(settings.limits.concurrent_calls)
        self._log = SessionLog()
        self._asked: Counter[str] = Counter()
        """Prompts, by their ids."""
        self._failures: dict[bytes, sampling.Failure] = {}
        """Of calls that were not answered later, by what they asked."""
        self._replies: dict[str, Node] = {}
        """The first answer of each reply."""
        self._instructed: set[str] = set()
        """Replies to requests that had instructions, which stand first."""
        self._last: Node | None = None
        self.began_at = time.time()
        """Unix seconds."""
        self._deadline: float | None = None
        self.ended_by: str | None = None
        """The limit that a call met, or what `end` was told."""
        self._is_over = False
        self.on_end: Callable[[], None] = lambda: None
        """Called as it ends."""

    def openai(self) -> Any:
        """A client of the `openai` package: `AsyncOpenAI` inside a coroutine, else `OpenAI`."""
        import openai

        return _client(openai, "OpenAI", self.base_url, self.api_key)

    def anthropic(self) -> Any:
        """A client of the `anthropic` package: `AsyncAnthropic` inside a coroutine, else
        `Anthropic`."""
        import anthropic

        return _client(anthropic, "Anthropic", self.anthropic_url, self.api_key)

    def model_name(self, model: str) -> str:
        """A name of `model` that says which session a call is of, for clients of which many share
        one base URL and key (those of the gateway)."""
        return f"{model}{KEY_MARK}{self.api_key}"

    def arrived(self, size: int) -> None:
        """A request of `size` bytes has come, and is read if this returns.

        Raises:
            CallError: a limit of the session is met, or it is over.
        """
        limits, counts = self.settings.limits, self._log
        self._check_open()
        now = sampling.sampling_time()
        if self._deadline is None:
            self._deadline = now + limits.seconds
        counts.calls += 1
        if counts.calls > limits.turns:
            self._refuse("turns", f"{limits.turns} calls")
        self.received(size)
        self._check_tokens()
        if now >= self._deadline:
            self._refuse("seconds", f"{limits.seconds:g} s")

    def received(self, size: int) -> None:
        """So many bytes more of a request have come than it was announced with.

        Raises:
            CallError: the limit is met.
        """
        self._log.bytes += size
        if self._log.bytes > (most := self.settings.limits.bytes):
            self._refuse("bytes", f"{most} bytes of requests")

    def _check_open(self) -> None:
        if self._is_over:
            raise CallError("this session is over", status=403, code="session_over")

    def _check_tokens(self) -> None:
        if self._log.tokens >= (most := self.settings.limits.tokens):
            self._refuse("tokens", f"{most} tokens")

    def _refuse(self, limit: str, shown: str) -> None:
        self.ended_by = self.ended_by or limit
        raise CallError(f"this session may have {shown}, and has had them", code="session_limit")

    def call(
        self, call: ModelCall, digest: bytes, *, is_retry: bool, reward: float | None = None
    ) -> PendingCall:
        """Begin to answer a call, or find the one that it asks for again.

        Args:
            call: what is asked.
            digest: of the request, the same for the same bytes.
            is_retry: whether the client says that it sends it again.
            reward: of the answer that it goes on from, or else the last one. Of a call that comes
                again it was said before.

        Raises:
            CallError: the session ended while the request was read.
        """
        self._check_open()
        return self._pending.begin(
            digest, lambda: self._answer(call, digest, reward), is_retry=is_retry
        )

    async def _answer(self, call: ModelCall, digest: bytes, reward: float | None) -> Reply:
        asked = settings_of(call, self.settings, self._tokenizer)
        place = self._locate(call, asked.template_kwargs)
        if reward is not None:
            self._log.rate(place.prompt.behind or (self._last.turn if self._last else None), reward)
        params = self._with_room(asked.params, place, call)
        outcomes: list[sampling.Survivor | sampling.Failure] = []
        try:
            await self._sampled(place, params, call, outcomes)
        finally:
            # Also where another completion failed, the time is up or the session ends.
            answers = [
                self._keep(one, place, call, asked)
                for one in outcomes
                if isinstance(one, sampling.Survivor)
            ]
            if answers:
                self._log.sampled(params)
        failure = next((one for one in outcomes if isinstance(one, sampling.Failure)), None)
        if failure is not None:
            self._failures[digest] = failure
            raise CallError.of(failure)
        self._failures.pop(digest, None)
        reply = Reply(
            id=self._hash("reply", len(self._replies)),
            created=int(time.time()),
            model=call.model,
            choices=[choice for choice, _ in answers],
            prompt_tokens=place.prompt.size,
            completion_tokens=sum(len(choice.token_ids) for choice, _ in answers),
        )
        self._replies[reply.id] = self._last = answers[0][1]
        if call.echo.get("instructions"):
            self._instructed.add(reply.id)
        if self.ended_by == CONTEXT:
            self.ended_by = None  # the agent went on with a shorter conversation
        return reply

    def _locate(self, call: ModelCall, template_kwargs: dict[str, Any]) -> Place:
        messages = [self._told(message) for message in call.messages]
        named = {self._replies[one["reply_id"]] for one in call.messages if "reply_id" in one}
        if call.previous_response_id is not None:
            reply_id = call.previous_response_id.removeprefix("resp_")
            behind = self._reply(reply_id, "previous_response_id", "previous_response_not_found")
            nodes = behind.path()
            named.update(nodes)
            before = [node.message for node in nodes]
            # As at OpenAI: instructions are of one request alone, other messages stay.
            before = before[reply_id in self._instructed :]
            instructions = messages[: bool(call.echo.get("instructions"))]
            messages = [*instructions, *before, *messages[len(instructions) :]]
        try:
            return self._tree.locate(
                messages,
                call.tools,
                template_kwargs,
                thinking_returns=call.protocol == "messages",
                named=named,
            )
        except (rollout.PromptError, ConversationError) as error:
            raise CallError(str(error), param=call.messages_field) from error

    def _reply(self, reply_id: str, param: str, code: str) -> Node:
        """An earlier answer, by its id, which the field `param` names."""
        if reply_id not in self._replies:
            message = f"no answer {reply_id!r} in this session: send the whole history"
            raise CallError(message, param=param, code=code)
        return self._replies[reply_id]

    def _told(self, message: dict[str, Any]) -> dict[str, Any]:
        """A message whole, also where the client names parts of an answer alone."""
        if "reply_id" not in message:
            return message
        answer = self._reply(message["reply_id"], "input", "item_not_found").message
        told = {name: value for name, value in message.items() if name not in ("reply_id", "parts")}
        told |= {name: answer[name] for name in message["parts"] if name in answer}
        calls = dict(enumerate(answer.get("tool_calls", ())))
        if named := [calls[part] for part in message["parts"] if part in calls]:
            told["tool_calls"] = [*named, *told.get("tool_calls", ())]
        return told

    def _with_room(
        self, params: sampling.SamplingParams, place: Place, call: ModelCall
    ) -> sampling.SamplingParams:
        """`max_tokens` no larger than what the context has room for."""
        context, size = self.settings.context_length, place.prompt.size
        if context is None:
            return params
        if size >= context:
            self.ended_by = self.ended_by or CONTEXT
            raise CallError(
                f"the prompt has {size} tokens, and the model's context is {context}: nothing can "
                "be sampled behind it. Shorten the conversation",
                param=call.messages_field,
                code="context_length_exceeded",
            )
        room = context - size
        asked = params.max_tokens
        return replace(params, max_tokens=room if asked is None else min(asked, room))

    async def _sampled(
        self,
        place: Place,
        params: sampling.SamplingParams,
        call: ModelCall,
        outcomes: list[sampling.Survivor | sampling.Failure],
    ) -> None:
        """Sample a call's completions, and put into `outcomes` what came of them, also where this
        raises."""
        ids = place.prompt.ids
        key = ids.affinity
        turn = self._asked[key]
        self._asked[key] += 1
        if call.seed is not None:
            seeds = sampling.derive_seeds(call.seed, key, call.n)
        else:
            seeds = sampling.derive_seeds(self._seed, f"{key} {turn}", call.n)
        params = replace(params, session=self._salt)
        assert self._deadline is not None  # noqa: S101 - a call has arrived
        left = self._deadline - sampling.sampling_time()
        deadline = sampling.Deadline(max(left, 0.001))
        tasks: list[asyncio.Future[sampling.Survivor | sampling.Failure]] = []
        try:
            async with deadline, self._slots:
                self._check_tokens()  # others were sampled since it arrived
                self._log.tokens += len(place.prompt.new_ids)
                self._log.sent += len(ids) * call.n
                tasks += [asyncio.ensure_future(self._sample(ids, params, seed)) for seed in seeds]
                await asyncio.gather(*tasks)
            return
        except sampling.RunStoppedError as error:
            stopped = sampling.Failure(
                index=0, kind="unavailable", message=str(error), attempts=0, seconds=0.0
            )
            outcomes.append(stopped)
            return
        except TimeoutError:
            if not deadline.expired():
                raise
        finally:
            for task in tasks:
                task.cancel()
            ended = await asyncio.gather(*tasks, return_exceptions=True)
            outcomes += [one for one in ended if not isinstance(one, BaseException)]
        self._refuse("seconds", f"{self.settings.limits.seconds:g} s")
        raise AssertionError  # not reached: _refuse raises

    def _keep(
        self,
        survivor: sampling.Survivor,
        place: Place,
        call: ModelCall,
        asked: Asked,
    ) -> tuple[ReplyChoice, Node]:
        completion, tokenizer = survivor.completion, self._tokenizer
        turn = answered(place.prompt, completion)
        reader = rollout.AnswerReader(
            place.prompt.ids,
            tokenizer,
            tools=call.tools if asked.reads_calls else None,
            split_reasoning=self.settings.split_reasoning,
        )
        message = reader.read(completion.text or "").message
        number = len(self._tree.turns)
        for index, one in enumerate(message.get("tool_calls", ())):
            one["id"] = self._call_id(number, index)
        node = self._tree.answered(place, turn, message)
        self._log.answered(turn, survivor, call, asked, place)
        named = completion.stop_reason
        return (
            ReplyChoice(
                content=message["content"],
                reasoning=message.get("reasoning_content"),
                tool_calls=message.get("tool_calls", ()),
                finish_reason=completion.finish_reason,
                token_texts=[tokenizer.decode([token]) for token in completion.token_ids]
                if call.logprobs
                else (),
                token_ids=completion.token_ids,
                logprobs=completion.logprobs,
                stop_sequence=named if isinstance(named, str) and named in call.stop else None,
            ),
            node,
        )

    def _call_id(self, turn: int, index: int) -> str:
        # Templates of Mistral refuse ids that are not nine letters or digits.
        digest = self._hash("call", turn, index)
        is_short = rollout.tool_format(self._tokenizer) == "mistral"
        return digest[:9] if is_short else f"call_{digest}"

    def _hash(self, *parts: object) -> str:
        key = "\0".join(map(str, (self._salt, *parts)))
        return hashlib.blake2b(key.encode(), digest_size=16).hexdigest()

    def reward(self, value: float, reply_id: str | None = None) -> None:
        """Say what an answer is worth; it stands in `step_rewards`, for the evaluator.

        Args:
            value: a finite number.
            reply_id: that the client was given with the answer; None: the last one.

        Raises:
            CallError: there is no such answer, or the value is no finite number.
        """
        bare = None if reply_id is None else reply_id.rpartition("_")[2].rpartition("-")[2]
        node = self._last if bare is None else self._replies.get(bare)
        self._log.rate(None if node is None else node.turn, value)

    def conversation(self) -> list[Node]:
        """The messages of the last call that was answered, and its answer."""
        return [] if self._last is None else self._last.path()

    def asked_with(self, node: Node) -> tuple[list[dict[str, Any]] | None, float]:
        """The tools of the call that an answer was sampled for, and when that was, in Unix
        seconds."""
        assert node.turn is not None  # noqa: S101 - it is an answer
        return self._log.tools_of(node.turn), self._log.answered_at[id(node.turn)]

    def depart(self, departure: Departure) -> None:
        """Put on record what was not honoured."""
        self._log.departures[msgspec.json.encode(departure)] += 1

    @property
    def failure(self) -> sampling.Failure | None:
        """A call that got no completion, and was not answered later."""
        return next(iter(self._failures.values()), None)

    def metrics(self) -> dict[str, Any]:
        """What an episode's record says of the session until now, in `metrics`."""
        return self.record().record.metrics

    async def end(self, stop_reason: str | None = None) -> None:
        """No further call is answered; those that run are cancelled."""
        self._is_over = True
        self.ended_by = self.ended_by or stop_reason
        self.on_end()
        await self._pending.cancel()

    async def finish(self, stop_reason: str = "done") -> SessionRecord:
        """End it, and say what was sampled.

        Args:
            stop_reason: of the trajectory, unless a limit ended it.
        """
        await self.end()
        return self.record(stop_reason)

    def record(self, stop_reason: str = "done") -> SessionRecord:
        """What was sampled until now, as one trajectory."""
        return self._log.record(
            [turn for turn, _ in self._tree.turns],
            self.conversation(),
            shared=self.settings.shared,
            stop_reason=self.ended_by or stop_reason,
            undelivered=self._pending.undelivered,
            failure=self.failure,
        )


def _client(package: Any, name: str, url: str, key: str) -> Any:
    """A client for where this is called: in an event loop or not. Over plain HTTP it loads no
    certificates, which takes 25 ms of each rollout."""
    try:
        asyncio.get_running_loop()
        kind = "Async"
    except RuntimeError:
        kind = ""
    transport = getattr(package, f"Default{kind}HttpxClient")(verify=not url.startswith("http:"))
    return getattr(package, kind + name)(base_url=url, api_key=key, http_client=transport)
