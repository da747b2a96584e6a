"""One agent's rollout: its calls, answered one by one and kept as a tree.

Invariant: every completion that was sampled for a session is in its trajectory, whatever became of
the agent, and no other session sees it. A call that a client sends again because it never had its
answer gets the completion that was sampled for it. A call that fails changes nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import msgspec

from eval_protocol_rft import rollout, sampling
from eval_protocol_rft._segments import EpisodeRecord, Segment
from eval_protocol_rft.episodes._rendering import ChatText, ConversationError, Rewrite
from eval_protocol_rft.episodes._turns import Turn, answered, with_versions
from eval_protocol_rft.episodes.gateway import _trajectory as trajectory
from eval_protocol_rft.episodes.gateway._call import CallError, ModelCall, Reply, ReplyChoice
from eval_protocol_rft.episodes.gateway._settings import (
    Asked,
    Departure,
    SessionSettings,
    settings_of,
)
from eval_protocol_rft.episodes.gateway._tree import CallTree, Edit, Node, Place
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


class PendingCall:
    """A call and its answer, which may be fetched again while no client has had it."""

    __slots__ = ("clients", "is_answered", "task")

    def __init__(self, task: asyncio.Task[Reply]) -> None:
        self.task = task
        self.clients = 0
        """Connections that wait for it now."""
        self.is_answered = False
        """Whether a client had all of it."""

    @contextlib.contextmanager
    def fetched(self) -> Iterator[None]:
        """A client waits for it."""
        self.clients += 1
        try:
            yield
        finally:
            self.clients -= 1

    @property
    def is_interrupted(self) -> bool:
        """Whether its client went away without it."""
        return not self.clients and not self.is_answered and not self._failed

    @property
    def _failed(self) -> bool:
        return self.task.done() and (self.task.cancelled() or self.task.exception() is not None)


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionRecord:
    """What became of a session."""

    segments: list[Segment]
    """Empty where nothing was sampled."""
    record: EpisodeRecord
    first: sampling.Survivor | None
    """The first turn that is trained, with the attempts of all calls; None where there is none."""
    first_prompt: sampling.TokenIds
    path: list[Turn]
    """The conversation of the last call."""
    tools: Sequence[dict[str, Any]] | None
    """Of that conversation."""
    sent_tokens: int
    """Of all calls, each with its whole prompt."""
    sampled_tokens: int
    sampled_with: Sequence[sampling.SamplingParams]
    """With which calls were sampled that draw from another distribution, each once."""
    failure: sampling.Failure | None
    """A call that got no completion, and was not answered later: what the agent did then says
    nothing of the policy."""


@dataclass(slots=True, kw_only=True)
class _Counts:
    """What a session used up."""

    calls: int = 0
    bytes: int = 0
    tokens: int = 0
    sent: int = 0
    attempts: int = 0
    causes: list[str] = field(default_factory=list)


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
        self._pending: dict[bytes, list[PendingCall]] = {}
        self._slots = asyncio.Semaphore(settings.limits.concurrent_calls)
        self._counts = _Counts()
        self._asked: Counter[str] = Counter()
        """Prompts, by their ids."""
        self._edits: list[Edit] = []
        self._departures: Counter[bytes] = Counter()
        self._notes: dict[str, None] = {}
        self._ignored: dict[str, None] = {}
        """Fields of requests that change no token."""
        self._sampled_with: dict[str, sampling.SamplingParams] = {}
        self._failures: dict[bytes, sampling.Failure] = {}
        """Of calls that were not answered later, by what they asked."""
        self._survivors: dict[int, sampling.Survivor] = {}
        """By the turn."""
        self._rewards: dict[int, float] = {}
        self._replies: dict[str, Node] = {}
        """The first answer of each reply."""
        self._instructed: set[str] = set()
        """Replies to requests that had instructions, which stand first."""
        self._last: Node | None = None
        self._tools: dict[int, Any] = {}
        self._answered_at: dict[int, float] = {}
        """By the turn, Unix seconds."""
        self._began = sampling.sampling_time()
        self.began_at = time.time()
        """Unix seconds."""
        self._deadline: float | None = None
        self.ended_by: str | None = None
        """The limit that a call met, or what `end` was told."""
        self._is_over = False
        self.on_end: Callable[[], None] = lambda: None
        """Called once it is over."""

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
        limits, counts = self.settings.limits, self._counts
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
        self._counts.bytes += size
        if self._counts.bytes > (most := self.settings.limits.bytes):
            self._refuse("bytes", f"{most} bytes of requests")

    def _check_open(self) -> None:
        if self._is_over:
            raise CallError("this session is over", status=403, code="session_over")

    def _check_tokens(self) -> None:
        if self._counts.tokens >= (most := self.settings.limits.tokens):
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
        same = self._pending.setdefault(digest, [])
        found = next((one for one in same if one.is_interrupted), None)
        if found is None and is_retry and same and not same[-1]._failed:
            found = same[-1]
        if found is None:
            found = PendingCall(asyncio.ensure_future(self._answer(call, digest, reward)))
            found.task.add_done_callback(_seen)
            same.append(found)
        return found

    async def _answer(self, call: ModelCall, digest: bytes, reward: float | None) -> Reply:
        asked = settings_of(call, self.settings, self._tokenizer)
        place = self._locate(call, asked.template_kwargs)
        if reward is not None:
            self._rate(place.prompt.behind or (self._last.turn if self._last else None), reward)
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
                self._sampled_with.setdefault(repr(_drawn_with(params)), params)
        failure = next((one for one in outcomes if isinstance(one, sampling.Failure)), None)
        if failure is not None:
            self._failures[digest] = failure
            raise _as_error(failure)
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
            raise CallError(str(error), param=_messages_field(call)) from error

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
                param=_messages_field(call),
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
                self._counts.tokens += len(place.prompt.new_ids)
                self._counts.sent += len(ids) * call.n
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
        self._note(call, asked, place)
        counts = self._counts
        counts.tokens += len(completion.token_ids)
        counts.attempts += survivor.attempts
        counts.causes += survivor.causes
        self._survivors[id(turn)] = survivor
        self._tools[id(turn)] = call.tools
        self._answered_at[id(turn)] = time.time()
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

    def _note(self, call: ModelCall, asked: Asked, place: Place) -> None:
        """What an answered call asked for or said otherwise; once, for any number of answers."""
        self._departures.update(msgspec.json.encode(one) for one in asked.departures)
        self._notes.update(dict.fromkeys(place.notes))
        self._ignored.update(dict.fromkeys(call.ignored))
        self._edits += place.edits
        asked.departures.clear()
        place.edits.clear()

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
        self._rate(None if node is None else node.turn, value)

    def _rate(self, turn: Turn | None, value: float) -> None:
        if turn is None:
            raise CallError("there is no such answer in this session", status=404, param="id")
        if not isinstance(value, int | float) or value != value or abs(value) == float("inf"):
            raise CallError(f"a reward is a finite number, not {value!r}", param="reward")
        self._rewards[id(turn)] = float(value)

    def conversation(self) -> list[Node]:
        """The messages of the last call that was answered, and its answer."""
        return [] if self._last is None else self._last.path()

    def asked_with(self, node: Node) -> tuple[list[dict[str, Any]] | None, float]:
        """The tools of the call that an answer was sampled for, and when that was, in Unix
        seconds."""
        return self._tools[id(node.turn)], self._answered_at[id(node.turn)]

    def depart(self, departure: Departure) -> None:
        """Put on record what was not honoured."""
        self._departures[msgspec.json.encode(departure)] += 1

    @property
    def failure(self) -> sampling.Failure | None:
        """A call that got no completion, and was not answered later."""
        return next(iter(self._failures.values()), None)

    def metrics(self) -> dict[str, Any]:
        """What an episode's record says of the session until now, in `metrics`."""
        turns = [turn for turn, _ in self._tree.turns]
        return self._metrics(turns, trajectory.trained_branches(turns, self.settings.shared))

    async def end(self, stop_reason: str | None = None) -> None:
        """No further call is answered; those that run are cancelled."""
        self._is_over = True
        self.ended_by = self.ended_by or stop_reason
        tasks = [one.task for same in self._pending.values() for one in same]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self.on_end()

    async def finish(self, stop_reason: str = "done") -> SessionRecord:
        """End it, and say what was sampled.

        Args:
            stop_reason: of the trajectory, unless a limit ended it.
        """
        await self.end()
        return self.record(stop_reason)

    def record(self, stop_reason: str = "done") -> SessionRecord:
        """What was sampled until now, as one trajectory."""
        turns = [turn for turn, _ in self._tree.turns]
        shared = self.settings.shared
        branches = trajectory.trained_branches(turns, shared)
        path = [] if self._last is None or self._last.turn is None else self._last.turn.path()
        first = branches[0][0] if branches else None
        messages = [] if self._last is None else [node.message for node in self._last.path()]
        return SessionRecord(
            segments=trajectory.segments_in(branches, shared),
            record=EpisodeRecord(
                turns=len({id(turn) for path in branches for turn in path}),
                stop_reason=self.ended_by or stop_reason,
                finish_reason=branches[-1][-1].completion.finish_reason if branches else None,
                step_rewards=self._step_rewards(branches),
                metrics=self._metrics(turns, branches),
                messages=messages,
            ),
            first=None if first is None else self._first_survivor(first, turns),
            first_prompt=sampling.TokenIds() if first is None else first.prompt.ids,
            path=path,
            tools=self._tools.get(id(path[-1])) if path else None,
            sent_tokens=self._counts.sent,
            sampled_tokens=sum(len(turn.completion.token_ids) for turn in turns),
            sampled_with=list(self._sampled_with.values()),
            failure=self.failure,
        )

    def _first_survivor(self, first: Turn, turns: Sequence[Turn]) -> sampling.Survivor:
        counts = self._counts
        return replace(
            self._survivors[id(first)],
            completion=with_versions(
                [first.completion, *(turn.completion for turn in turns if turn is not first)]
            ),
            attempts=counts.attempts,
            seconds=sampling.sampling_time() - self._began,
            causes=tuple(counts.causes),
        )

    def _step_rewards(self, branches: Sequence[Sequence[Turn]]) -> list[float | None]:
        if not self._rewards:
            return []
        turns = {id(turn): None for path in branches for turn in path}
        return [self._rewards.get(turn) for turn in turns]

    def _metrics(self, turns: Sequence[Turn], branches: Sequence[Sequence[Turn]]) -> dict[str, Any]:
        undelivered = sum(one.is_interrupted for same in self._pending.values() for one in same)
        rewrites: dict[int, Rewrite] = {
            id(turn.prompt.rewrite): turn.prompt.rewrite
            for turn in turns
            if turn.prompt.rewrite is not None
        }
        departures = [
            {**msgspec.to_builtins(msgspec.json.decode(one, type=Departure)), "calls": count}
            for one, count in self._departures.items()
        ]
        told: dict[str, Any] = {
            "history_rewrites": [msgspec.to_builtins(one) for one in rewrites.values()],
            "client_edits": [msgspec.to_builtins(one) for one in self._edits],
            "departures": departures,
            "rendered_as": list(self._notes),
            "ignored_fields": sorted(self._ignored),
            "undelivered": undelivered,
        }
        return {
            "calls": self._counts.calls,
            "branches": len(branches),
            "shared": self.settings.shared,
            **{name: value for name, value in told.items() if value},
        }


def _drawn_with(params: sampling.SamplingParams) -> tuple[Any, ...]:
    """What says which distribution tokens are drawn from."""
    return params.temperature, params.top_p, params.top_k, params.extra


def _messages_field(call: ModelCall) -> str:
    """What the messages of a request are called in its protocol."""
    return "input" if call.protocol == "responses" else "messages"


def _as_error(failure: sampling.Failure) -> CallError:
    """A completion that could not be had, in the words of HTTP. It was tried as often as the run's
    budget says, so the client is told not to try again."""
    if failure.kind in ("refused", "prompt"):
        return CallError(failure.message, code="refused_by_engine")
    return CallError(
        f"no completion after {failure.attempts} attempts: {failure.message}",
        status=502,
        code="sampling_failed",
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


def _seen(task: asyncio.Task[Reply]) -> None:
    """An error that no client waits for any more is not asyncio's to complain of."""
    if not task.cancelled():
        task.exception()
