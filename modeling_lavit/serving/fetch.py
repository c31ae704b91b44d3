"""Fetching images from addresses that strangers name, without reaching into the server's own network.

An address is resolved by us, refused unless every one of its numbers is a public one, and the connection goes to the
numbers that were checked: a name that answers differently the second time gains nothing. Redirects are followed by us
too, each checked like the first.
"""

import asyncio
import ipaddress
import socket
from collections.abc import Callable
from urllib.parse import urljoin, urlsplit

import aiohttp
from aiohttp.abc import AbstractResolver

from modeling_lavit.serving.errors import ApiError


SECONDS = 10
REDIRECTS = 3
CHUNK = 65_536
NAT64 = ipaddress.ip_network("64:ff9b::/96")  # IPv4 addresses within IPv6 ones


def is_public(number: str) -> bool:
    """Whether an IP address belongs to the internet at large."""
    address = ipaddress.ip_address(number.split("%")[0])
    if address.version == 6 and address in NAT64:
        address = ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
    inner = getattr(address, "sixtofour", None) or address
    return all(one.is_global and not one.is_multicast for one in (address, inner))


class PublicResolver(AbstractResolver):
    """Resolves names to the addresses that `is_allowed`, and refuses names with any other."""

    def __init__(self, is_allowed: Callable[[str], bool]):
        self.is_allowed = is_allowed

    async def resolve(self, host: str, port: int = 0, family: int = socket.AF_UNSPEC) -> list[dict]:
        """See `aiohttp.abc.AbstractResolver`."""
        loop = asyncio.get_running_loop()
        found = await loop.getaddrinfo(host, port, family=family, type=socket.SOCK_STREAM)
        if not all(self.is_allowed(str(address[0])) for *_, address in found):
            raise PermissionError(host)
        return [
            {
                "hostname": host,
                "host": address[0],
                "port": port,
                "family": its_family,
                "proto": proto,
                "flags": socket.AI_NUMERICHOST,
            }
            for its_family, _, proto, _, address in found
        ]

    async def close(self) -> None:
        """See `aiohttp.abc.AbstractResolver`."""


async def fetch(
    address: str,
    max_bytes: int,
    param: str,
    is_allowed: Callable[[str], bool] = is_public,
    seconds: float = SECONDS,
) -> bytes:
    """What an http(s) address holds.

    Args:
        address: of http or https.
        max_bytes: more is refused.
        param: the request's field, for messages.
        is_allowed: which IP addresses may be connected to.
        seconds: for all of it, redirects included.

    Raises:
        ApiError: 400, with the reason in few words: nothing is told about what is inside the network.
    """
    resolver = PublicResolver(is_allowed)
    connector = aiohttp.TCPConnector(resolver=resolver, use_dns_cache=False, limit=1)
    try:
        async with asyncio.timeout(seconds):
            async with aiohttp.ClientSession(connector=connector, trust_env=False, auto_decompress=False) as session:
                return await _follow(session, address, max_bytes, resolver.is_allowed)
    except TimeoutError as error:
        reason = f"it did not answer within {seconds:g} s"
        raise ApiError(400, f"the image's address cannot be fetched: {reason}", param, "invalid_image_url") from error
    except (aiohttp.ClientError, OSError, ValueError) as error:
        reason = str(error) if type(error) is ValueError else "it cannot be reached"
        if isinstance(error, PermissionError) or isinstance(error.__cause__, PermissionError):
            reason = "it lies in a private network"
        raise ApiError(400, f"the image's address cannot be fetched: {reason}", param, "invalid_image_url") from error


async def _follow(
    session: aiohttp.ClientSession, address: str, max_bytes: int, is_allowed: Callable[[str], bool]
) -> bytes:
    for _ in range(REDIRECTS + 1):
        _check_number(address, is_allowed)
        async with session.get(address, allow_redirects=False) as response:
            if response.status in (301, 302, 303, 307, 308) and "Location" in response.headers:
                address = urljoin(address, response.headers["Location"])
                continue
            if response.status != 200:
                raise ValueError(f"it answers with status {response.status}")
            if (response.content_length or 0) > max_bytes:
                raise ValueError(f"it holds more than {max_bytes} bytes")
            content = bytearray()
            async for chunk in response.content.iter_chunked(CHUNK):
                content += chunk
                if len(content) > max_bytes:
                    raise ValueError(f"it holds more than {max_bytes} bytes")
            return bytes(content)
    raise ValueError(f"it redirects more than {REDIRECTS} times")


def _check_number(address: str, is_allowed: Callable[[str], bool]) -> None:
    """Refuses other schemes, and IP addresses written as such, which no resolver sees."""
    parts = urlsplit(address)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError("it is no http(s) address")
    try:
        number = str(ipaddress.ip_address(parts.hostname))
    except ValueError:
        return
    if not is_allowed(number):
        raise PermissionError(number)
