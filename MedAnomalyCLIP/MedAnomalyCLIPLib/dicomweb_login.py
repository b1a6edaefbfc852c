"""Who we are to an archive: what the environment or the keyring of this computer says.

Read wherever a connection is opened, so that credentials are in no command line, no file of ours, and in
nothing that goes to workers.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace
from pathlib import Path

from .errors import InvalidRequest

TOKEN = "MEDANOMALYCLIP_DICOMWEB_TOKEN"
USER, PASSWORD = "MEDANOMALYCLIP_DICOMWEB_USER", "MEDANOMALYCLIP_DICOMWEB_PASSWORD"
CERTIFICATE, KEY = "MEDANOMALYCLIP_DICOMWEB_CERT", "MEDANOMALYCLIP_DICOMWEB_KEY"
AUTHORITIES = "MEDANOMALYCLIP_DICOMWEB_CA"


@dataclass(frozen=True)
class Login:
    """How to prove who we are.

    Attributes:
        token: for a server that wants a bearer token; or
        user, password: for one that wants these; all empty for one that wants nothing.
        certificate, key: PEM files of a client certificate and of its key, if that is apart.
        authorities: PEM file or folder of those whose certificates we trust; empty for those that are usual.
    """

    token: str = field(default="", repr=False)
    user: str = field(default="", repr=False)
    password: str = field(default="", repr=False)
    certificate: str = field(default="", repr=False)
    key: str = field(default="", repr=False)
    authorities: str = field(default="", repr=False)

    @classmethod
    def of_environment(cls) -> Login:
        """What the environment variables say.

        Raises:
            InvalidRequest: they contradict each other, or name a file that is not there.
        """
        names = (TOKEN, USER, PASSWORD, CERTIFICATE, KEY, AUTHORITIES)
        login = cls(*(os.environ.get(name, "") for name in names))
        if login.token and (login.user or login.password):
            raise InvalidRequest(f"Set either {TOKEN}, or {USER} and {PASSWORD}, not both")
        if login.password and not login.user:
            raise InvalidRequest(f"{PASSWORD} is set, but not whose it is: set {USER} too")
        if login.key and not login.certificate:
            raise InvalidRequest(
                f"{KEY} is set, but no certificate that it belongs to: set {CERTIFICATE} too"
            )
        for name, path in (
            (CERTIFICATE, login.certificate),
            (KEY, login.key),
            (AUTHORITIES, login.authorities),
        ):
            if path and not Path(path).exists():
                raise InvalidRequest(
                    f"{name} names a file that is not there; set it to a PEM file, or unset it"
                )
        return login

    def completed(self, url: str) -> Login:
        """With the password that the keyring has for this address, where the environment says too little."""
        if self.token or self.password:
            return self
        user, password = _kept(url, self.user)
        return replace(self, user=user, password=password)


def _kept(url: str, user: str) -> tuple[str, str]:
    """User and password of an address in the keyring; empty where there is none."""
    try:
        import keyring
        from keyring.errors import KeyringError
    except ImportError:
        return user, ""
    try:
        found = keyring.get_credential(url, user or None)
    except KeyringError:  # a computer without one, or one that stays locked
        found = None
    return (found.username or "", found.password or "") if found else (user, "")
