"""An identity provider: its keys over HTTP, and its tokens."""

import asyncio
import json
from collections.abc import Mapping
from contextlib import suppress
from typing import Any, Self

import jwt
from aiohttp import web
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa


class SigningKey:
    """A private key, with the id and the algorithm that its tokens name."""

    def __init__(self, key_id: str, algorithm: str = "ES256") -> None:
        self.id = key_id
        self.algorithm = algorithm
        self.private: Any
        if algorithm.startswith(("RS", "PS")):
            self.private = rsa.generate_private_key(65537, 2048)
        elif algorithm == "EdDSA":
            self.private = ed25519.Ed25519PrivateKey.generate()
        else:
            self.private = ec.generate_private_key(ec.SECP256R1())

    def jwk(self, **others: Any) -> dict[str, Any]:
        """The public key as JSON Web Key, with further members."""
        form = jwt.get_algorithm_by_name(self.algorithm)
        return {**form.to_jwk(self.private.public_key(), as_dict=True), "kid": self.id, **others}

    def sign(self, claims: Mapping[str, Any], **header: Any) -> str:
        """Makes a token with these claims."""
        return jwt.encode(dict(claims), self.private, self.algorithm, {"kid": self.id, **header})


class KeyServer:
    """Serves a JSON Web Key Set over HTTP while its context is entered."""

    def __init__(self, *keys: SigningKey) -> None:
        self.keys: list[Any] = [key.jwk() for key in keys]
        self.fetches = 0
        """Requests so far."""
        self.content: bytes | None = None
        """What is sent instead of the keys."""
        self.status = 200
        self.headers: dict[str, str] = {}
        self.hold: asyncio.Event | None = None
        """Set when an answer may begin."""
        self.issuer = ""
        """What the OpenID Connect configuration says of itself."""
        self.jwks_uri: Any = ...
        """What it says of where the keys are; where they are when nothing else is set."""
        self.configuration: bytes | None = None
        """What is sent instead of it."""
        self.endless = False
        """The answer is a file without an end."""

    async def __aenter__(self) -> Self:
        app = web.Application()
        app.router.add_get("/keys", self._serve)
        app.router.add_get("/realms/acme/.well-known/openid-configuration", self._configure)
        self._runner = web.AppRunner(app, shutdown_timeout=0.1)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", 0).start()
        self._port = self._runner.addresses[0][1]
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._runner.cleanup()

    @property
    def base(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    @property
    def url(self) -> str:
        return f"{self.base}/keys"

    async def _configure(self, request: web.Request) -> web.Response:
        told = {"issuer": self.issuer, "jwks_uri": self.url if self.jwks_uri is ... else self.jwks_uri}
        content = json.dumps(told).encode() if self.configuration is None else self.configuration
        return web.Response(body=content, status=self.status)

    async def _serve(self, request: web.Request) -> web.StreamResponse:
        self.fetches += 1
        if self.hold is not None:
            await self.hold.wait()
        if self.endless:
            endless = web.StreamResponse()
            await endless.prepare(request)
            with suppress(ConnectionError):
                while True:
                    await endless.write(b" " * 65536)
            return endless
        content = json.dumps({"keys": self.keys}).encode() if self.content is None else self.content
        return web.Response(body=content, status=self.status, headers=self.headers)
