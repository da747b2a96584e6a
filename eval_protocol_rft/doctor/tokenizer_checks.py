"""Whether text survives the tokenizer, and whether it is the tokenizer of the server. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from eval_protocol_rft.doctor.findings import Finding, Verdict, skipped
from eval_protocol_rft.doctor.texts import FURTHER_TEXTS, PLAIN_TEXTS
from eval_protocol_rft.sampling.types import Completion, SamplingParams
from eval_protocol_rft.tokenizer import LoadedTokenizer

ROUND_TRIP = "tokenizer round trip"
SAME_TOKENIZER = "tokenizer is the server's"


def round_trip(tokenizer: LoadedTokenizer) -> Finding:
    """Text to ids and back. Prompts are made of text, so what is lost here the model never sees."""
    plain, further = (_changed(tokenizer, texts) for texts in (PLAIN_TEXTS, FURTHER_TEXTS))
    total = len(PLAIN_TEXTS) + len(FURTHER_TEXTS)
    changed = plain + further
    verdict: Verdict = "fail" if plain else "warn" if further else "pass"
    return Finding(
        name=ROUND_TRIP,
        verdict=verdict,
        measured=f"{total - len(changed)} of {total} texts come back"
        + (f"; {changed[0][0]!r} comes back as {changed[0][1]!r}" if changed else ""),
        bar="all of them; fails where one of plain ASCII does not",
        advice="The model sees another text than the data set holds: check the tokenizer's files "
        "(normalizer, added prefix space), or use the model's own tokenizer."
        if changed
        else "",
        numbers={"texts": total, "changed": len(changed)},
    )


def _changed(tokenizer: LoadedTokenizer, texts: Sequence[str]) -> list[tuple[str, str]]:
    changed = []
    for text in texts:
        ids: list[int] = list(tokenizer.tokenizer.encode(text, add_special_tokens=False))
        back = tokenizer.decode(ids)
        if back != text:
            changed.append((text, back))
    return changed


def same_tokenizer(
    tokenizer: LoadedTokenizer, completions: Sequence[Completion], params: SamplingParams
) -> Finding:
    """Sampled ids decoded here, against the text that the server decoded from them."""
    told = [completion for completion in completions if completion.text is not None]
    if not told:
        return skipped(SAME_TOKENIZER, "the server sent no text")
    size = len(tokenizer.tokenizer)
    highest = max(max(completion.token_ids) for completion in told)
    differ = [c for c in told if highest < size and not _same_text(tokenizer, c, params)]
    verdict: Verdict = "warn" if differ else "pass"
    if highest >= size or 2 * len(differ) > len(told):
        verdict = "fail"
    if highest >= size:
        measured = f"id {highest} was sampled, and {tokenizer.name!r} ends at {size - 1}"
    else:
        measured = f"{len(told) - len(differ)} of {len(told)} completions decode to the same text"
    if differ:
        ours = tokenizer.decode_completion(differ[0], params)
        measured += f"; {ours[:40]!r} here, {(differ[0].text or '')[:40]!r} there"
    return Finding(
        name=SAME_TOKENIZER,
        verdict=verdict,
        measured=measured,
        bar="all of them; fails where most differ, or an id is none of ours",
        advice="Name the tokenizer of the model that the server runs, with --tokenizer."
        if verdict != "pass"
        else "",
        numbers={"completions": len(told), "differ": len(differ), "highest_id": highest},
    )


def _same_text(tokenizer: LoadedTokenizer, completion: Completion, params: SamplingParams) -> bool:
    """Servers leave out control tokens, all or the last; and half a character at the end."""
    without = tokenizer.tokenizer.decode(
        completion.token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
    )
    ours = {
        tokenizer.decode_completion(completion, params),
        tokenizer.decode(completion.token_ids),
        without if isinstance(without, str) else "".join(without),
    }
    return (completion.text or "").rstrip("\ufffd") in {text.rstrip("\ufffd") for text in ours}
