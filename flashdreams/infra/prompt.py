"""Where a runner's prompt comes from."""

from pathlib import Path


def read_prompt(prompt: str, prompt_path: Path | None) -> str:
    """The prompt as typed, or the text of its file if one is named.

    Raises:
        ValueError: the file cannot be read or holds nothing.
    """
    if prompt_path is None:
        return prompt
    try:
        text = prompt_path.read_text(encoding="utf-8-sig").strip()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise ValueError(
            f"--prompt-path {prompt_path} cannot be read: {reason}. Name a text file, or give the "
            "words with --prompt."
        ) from error
    if not text:
        raise ValueError(f"--prompt-path {prompt_path} is empty; describe the video in it.")
    return text
