"""Who may come in: a browser that shows the token once, in the address, and from then on by a cookie.

trame's page takes the token out of the address bar at once, so that a page that is loaded again has to be
known by the cookie. The page may fetch nothing from anywhere else, which the browser is told to enforce.
"""

from __future__ import annotations

import hmac
import ipaddress
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from aiohttp import web

# Arguments of a program can be read by all users of a computer, its environment cannot.
TOKEN = "MEDANOMALYCLIP_WEB_TOKEN"

_REFUSAL = "Open the address that was printed at the start: it holds the token that lets you in."


def headers(request: web.Request) -> dict[str, str]:
    """What goes with the page: it may talk to its own server alone, and is kept nowhere."""
    policy = "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; connect-src 'self' data: blob:"
    return {
        # Some browsers do not take a socket of the same server for 'self'.
        "Content-Security-Policy": f"{policy} ws://{request.host} wss://{request.host}",
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-store",
    }


def guard(app: web.Application, content: str, token: str) -> None:
    """Let an application serve its page to those alone who have the token.

    Args:
        app: before its own routes are added, so that these come first.
        content: folder of the page.
        token: what has to be shown; the socket that carries images asks for it again.
    """
    from aiohttp import web

    async def enter(request: web.Request) -> web.StreamResponse:
        if not is_shown(request, token):
            return refusal(request)
        if request.query.get("secret") != token or request.path == "/":
            raise web.HTTPFound(f"/index.html?secret={token}")
        response = web.FileResponse(Path(content) / "index.html", headers=headers(request))
        remember(request, response, token)
        return response

    app.router.add_get("/", enter)
    app.router.add_get("/index.html", enter)


def is_shown(request: web.Request, token: str) -> bool:
    """Whether a request comes with the token, in its address or its cookie."""
    shown = (request.query.get("secret", ""), request.cookies.get(_cookie(request), ""))
    return any(hmac.compare_digest(text.encode(), token.encode()) for text in shown)


def remembered(request: web.Request) -> str:
    """What `remember` gave to the browser; empty if nothing."""
    return request.cookies.get(_cookie(request), "")


def remember(request: web.Request, response: Any, value: str) -> None:
    """Give the browser a cookie that no other site can make it send, and no script read."""
    response.set_cookie(
        _cookie(request), value, httponly=True, samesite="Strict", secure=request.scheme == "https"
    )


def refusal(request: web.Request) -> web.Response:
    from aiohttp import web

    return web.Response(status=403, text=_REFUSAL, headers=headers(request))


def _cookie(request: web.Request) -> str:
    """Cookies do not know ports: pages of several servers on one computer are told apart by the name."""
    return f"medanomalyclip_{request.url.port}"


def address(host: str, port: int) -> str:
    """What a browser on this computer calls a server."""
    try:
        place = ipaddress.ip_address(host)
    except ValueError:  # a name
        return f"http://{host}:{port}"
    if place.is_unspecified:  # it listens on all its addresses
        host = "::1" if place.version == 6 else "127.0.0.1"
    return f"http://[{host}]:{port}" if place.version == 6 else f"http://{host}:{port}"


def cannot_listen(host: str, port: int, error: OSError) -> str:
    """What to say when an address cannot be had."""
    return (
        f"Nothing can be served on {host}, port {port}: {error.strerror or error}; "
        "choose another with --port, or --host"
    )
