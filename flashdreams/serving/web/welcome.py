"""First visit to the page's URL with the token in it."""

import urllib.parse

from fastapi import Request
from fastapi.responses import RedirectResponse

from flashdreams.serving.web.guard import cookie_name


def keep_token(request: Request, wanted: str | None) -> RedirectResponse | None:
    """Move the token of a URL into a cookie, so that it is not in the URL and the history.

    Args:
        request: request of the page; the guard has checked its token.
        wanted: the server's token.

    Returns:
        None: the URL has no token, or the server requires none.
    """
    token = request.query_params.get("token")
    if token is None or not wanted:
        return None
    rest = [item for item in request.query_params.multi_items() if item[0] != "token"]
    answer = RedirectResponse(f"/?{urllib.parse.urlencode(rest)}" if rest else "/", 303)
    answer.set_cookie(
        cookie_name(request.scope),
        urllib.parse.quote(token, safe=""),
        httponly=True,
        samesite="strict",
        secure=request.url.scheme == "https",
    )
    return answer
