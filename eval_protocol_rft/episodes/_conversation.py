"""One episode's conversation with a model, exact to the token.

    talk = Conversation.start(messages, tools, tokenizer)
    talk.sampled(await sampler.sample(talk.prompt_ids, params))
    talk.append([{"role": "tool", "content": "3"}])        # the next talk.prompt_ids
    ...
    talk.segments()

Invariant: every sampled id is in exactly one segment, once, with `loss_mask` 1 and its own logprob;
every other id has 0 and 0.0. A segment begins with what was sent and ends with what was sampled.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from eval_protocol_rft._segments import Segment as Segment
from eval_protocol_rft._segments import turn_trace
from eval_protocol_rft.episodes import _rendering as rendering
from eval_protocol_rft.episodes._rendering import ConversationError
from eval_protocol_rft.episodes._turns import (
    OnRewrite,
    Prompt,
    Turn,
    answered,
    begin,
    follow,
    segments_of,
)
from eval_protocol_rft.local import LoadedTokenizer
from eval_protocol_rft.sampling import Completion, TokenIds


class Conversation:
    """What was sent to a model and sampled from it. Make one with `start`, then take turns:
    `sampled`, `append`, `sampled`, ... An error leaves it as it was."""

    def __init__(self, prompt: Prompt, *, on_rewrite: OnRewrite = "split") -> None:
        """`start` makes one."""
        if on_rewrite not in ("split", "reject"):
            raise ValueError(f"on_rewrite must be 'split' or 'reject', not {on_rewrite!r}")
        self._prompt = prompt
        self._prompt_ids = prompt.ids
        self._turn: Turn | None = None
        """A sampled turn that nothing was appended to yet."""
        self._on_rewrite = on_rewrite

    @classmethod
    def start(
        cls,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None,
        tokenizer: LoadedTokenizer,
        template_kwargs: Mapping[str, Any] | None = None,
        *,
        on_rewrite: OnRewrite = "split",
    ) -> Conversation:
        """A conversation whose `prompt_ids` are to be answered.

        Args:
            messages: what stands before the first sampled turn, in the chat API's form.
            tools: in the chat API's form; the same for the whole conversation.
            tokenizer: its chat template is what renders.
            template_kwargs: passed to the template.
            on_rewrite: what to do where the template renders earlier turns differently once more
                is appended (thinking stripped, arguments written anew, a system message moved):
                `split` begins a new segment whose prompt is what the template renders then, and
                records it in `rewrites`; `reject` raises `HistoryRewrittenError`.

        Raises:
            PromptError: as `rollout.render_chat`.
        """
        chat = rendering.ChatText(tokenizer, tools, dict(template_kwargs or {}))
        return cls(begin(chat, messages), on_rewrite=on_rewrite)

    def begun_again(self) -> Conversation:
        """Another one with the same beginning, which is not rendered again. Nothing was sampled in
        this one yet."""
        return Conversation(self._prompt, on_rewrite=self._on_rewrite)

    @property
    def prompt_ids(self) -> TokenIds:
        """The ids to send next; after `sampled`, those that were sent last."""
        return self._prompt_ids

    @property
    def messages(self) -> list[dict[str, Any]]:
        """The conversation as the template is given it."""
        said = self._prompt.conversation()
        return said if self._turn is None else [*said, self._turn.message]

    @property
    def sent_tokens(self) -> int:
        """Tokens of all requests that were answered, each with its whole prompt."""
        return sum(turn.prompt.size for turn in self._path())

    @property
    def rewrites(self) -> tuple[rendering.Rewrite, ...]:
        """Where the template rewrote history, one for each split."""
        prompts = [turn.prompt for turn in self._path()]
        if self._turn is None:
            prompts.append(self._prompt)
        return tuple(prompt.rewrite for prompt in prompts if prompt.rewrite is not None)

    def sampled(
        self, completion: Completion, message: Mapping[str, Any] | None = None
    ) -> dict[str, Any]:
        """Take the model's answer to `prompt_ids`; its ids and logprobs are kept as they are.

        Args:
            completion: what the sampler returned.
            message: the answer as the template shall be given it. Without one it is the sampled
                text, tool calls in it as the model wrote them, and thinking too unless the template
                reads `reasoning_content`; the channels of gpt-oss are fields. With one, whose tool
                calls are fields, the template writes their arguments in its own way: where the
                model wrote them in another, that is a rewrite.

        Returns:
            The message that the template is given.

        Raises:
            ConversationError: the last answer has had no reply yet.
            PromptError: `message` holds what no template renders.
        """
        if self._turn is not None:
            raise ConversationError("two turns in a row: append what came between them first")
        self._turn = answered(self._prompt, completion, message)
        return dict(self._turn.message)

    def append(self, messages: Sequence[Mapping[str, Any]]) -> TokenIds:
        """Say more: tool results, feedback, a question. Returns the next `prompt_ids`.

        They are those sent before, those sampled, and the ids of what the template renders behind
        them: where the turn was ended by a token, what stands after that token; where it was ended
        by a stop string, the template's own end of turn, which is context and was not sampled.

        Raises:
            ConversationError: the last turn was cut off at its token limit.
            HistoryRewrittenError: the template rewrites history and the policy is `reject`.
            ConversationError: there is no answer to append to, or nothing to append.
            PromptError: the template cannot render the messages, or drops them.
        """
        if self._turn is None:
            raise ConversationError("nothing was sampled since the last append: call sampled first")
        if not messages:
            raise ConversationError("no messages to append")
        if self._turn.completion.truncated:
            raise ConversationError(
                f"turn {self._turn.number} was cut off at its token limit: nothing can be said "
                "after a turn that has no end. End the episode, or allow more tokens per turn"
            )
        self._prompt = follow(self._turn, messages, on_rewrite=self._on_rewrite)
        self._turn = None
        self._prompt_ids = self._prompt.ids
        return self._prompt_ids

    def segments(self) -> list[Segment]:
        """What to train on, in order. What was appended and not answered is not in it."""
        return segments_of(self._path())

    def turns(self) -> list[dict[str, Any]]:
        """Every request and its answer, in order, as entries of `token_turn_traces`: `prompt_ids`,
        `completion_ids`, `completion_logprobs` (nats, of sampling) and `finish_reason`."""
        return traces_of(self._path())

    def _path(self) -> list[Turn]:
        last = self._turn or self._prompt.behind
        return [] if last is None else last.path()


def traces_of(path: Sequence[Turn]) -> list[dict[str, Any]]:
    """Turns as entries of `token_turn_traces`, each with the whole prompt that was sent."""
    return [
        turn_trace(
            list(turn.prompt.ids),
            list(turn.completion.token_ids),
            list(turn.completion.logprobs),
            turn.completion.finish_reason,
        )
        for turn in path
    ]
