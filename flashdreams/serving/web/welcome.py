"""The page's address with the token in it, as it is opened for the first time."""

import urllib.parse

from fastapi import Request
from fastapi.responses import RedirectResponse

from flashdreams.serving.web.guard import cookie_name


def keep_token(request: Request, wanted: str | None) -> RedirectResponse | None:
    """Put the token of an address into a cookie, so that it leaves the address and the history.

    Args:
        request: for the page; a guard knows its token to be right.
        wanted: the server's token.

    Returns:
        None: the address has no token, or the server wants none.
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
