"""Text for outputs whose encoding does not hold it: pipes on Windows, a locale without UTF-8."""

import codecs
import io
import sys
import unicodedata

_PLAIN = {
    "ε": "eps", "α": "alpha", "η": "eta", "∞": "inf", "≥": ">=", "≤": "<=", "→": "->", "←": "<-", "×": "x", "·": "*",
    "…": "...", "–": "-", "—": "-", "−": "-", "‖": "||", "∈": "in", "∇": "grad ",
    "§": "sec. ", "°": " deg", "±": "+-", "“": '"', "”": '"',
    "‘": "'", "’": "'",
}  # fmt: skip
_ENCODING = "innermax.plain"


def accept_all_text() -> None:
    """Prepares standard output and error for text that their encoding does not hold: it is printed in plainer signs.

    How a stream treats such text stays as it is where the user chose that (PYTHONIOENCODING=ascii:ignore).
    """
    codecs.register_error(_ENCODING, _plain)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors in ("strict", "surrogateescape", "backslashreplace"):
            stream.reconfigure(errors=_ENCODING)


def _plain(error: UnicodeError) -> tuple[str | bytes, int]:
    """A codec's error handler: plain signs for the first one that cannot be encoded."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    sign = error.object[error.start]
    if "\udc80" <= sign <= "\udcff":  # a byte of a file's name
        return bytes([ord(sign) - 0xDC00]), error.start + 1
    decomposed = unicodedata.normalize("NFKD", sign).encode("ascii", "ignore").decode()
    return _PLAIN.get(sign, decomposed or "?"), error.start + 1
