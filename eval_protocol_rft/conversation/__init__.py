"""Conversations of several turns, as exact ids: rendering, segments, tool calls. Pure.

Invariant: what was sampled is kept as it was; what stands between is the chat template's, and is
checked to continue what was sent. Nothing here does I/O, knows of rows, or imports Eval Protocol.
"""

from eval_protocol_rft.conversation.answers import Answer, AnswerReader
from eval_protocol_rft.conversation.call_formats import ParseProblem, ToolFormat
from eval_protocol_rft.conversation.conversation import (
    Conversation,
    OnRewrite,
    Opening,
    Openings,
)
from eval_protocol_rft.conversation.errors import (
    ConversationError,
    HistoryRewrittenError,
    Rewrite,
    UnfinishedTurnError,
)
from eval_protocol_rft.conversation.segments import Segment, Turn
from eval_protocol_rft.conversation.template_report import (
    TemplateCase,
    TemplateReport,
    template_report,
)
from eval_protocol_rft.conversation.tool_calls import parse_tool_calls, tool_format

__all__ = [
    "Answer",
    "AnswerReader",
    "Conversation",
    "ConversationError",
    "HistoryRewrittenError",
    "OnRewrite",
    "Opening",
    "Openings",
    "ParseProblem",
    "Rewrite",
    "Segment",
    "TemplateCase",
    "TemplateReport",
    "ToolFormat",
    "Turn",
    "UnfinishedTurnError",
    "parse_tool_calls",
    "template_report",
    "tool_format",
]
