"""The chat page: one HTML file that holds its styles and scripts, served at `/`.

It talks to the server it came from and to nobody else, and what a model writes must not be able to
change that. So the file has no address outside, and its headers tell the browser so: only the style
and the scripts whose SHA-256 is named here run, requests go to this server only, and no other page
may show it in a frame. A script that came in through a model's text would not run.
"""

import base64
import hashlib
import re
from importlib.resources import files

# A checkout on Windows may have CRLF, which browsers read as LF, also when they check a hash.
PAGE: bytes = files("salience.server").joinpath("page.html").read_bytes().replace(b"\r\n", b"\n")


def _hashes(tag: str) -> str:
    blocks = re.findall(rf"<{tag}>(.*?)</{tag}>".encode(), PAGE, re.DOTALL)
    digests = (base64.b64encode(hashlib.sha256(block).digest()).decode() for block in blocks)
    return " ".join(f"'sha256-{digest}'" for digest in digests)


HEADERS: dict[str, str] = {
    "Content-Type": "text/html; charset=utf-8",
    "Content-Security-Policy": "; ".join(
        (
            "default-src 'none'",
            "connect-src 'self'",
            f"script-src {_hashes('script')}",
            f"style-src {_hashes('style')}",
            "img-src data:",
            "base-uri 'none'",
            "form-action 'none'",
            "frame-ancestors 'none'",
        )
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-cache",
}
