"""Below stages 2 to 5: one connection to one libvirt, for as long as graincopy runs.

The binding is libvirt-python, or Debian's python3-libvirt; it is loaded when the first question is asked. Whatever
libvirt answers comes out as one of our errors. A daemon that was restarted in between is connected to again, once for
each question. https://libvirt.org/html/libvirt-virterror.html names the error codes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any, TypeVar

from graincopy.core.clock import Clock
from graincopy.core.errors import (
    AgentFailed,
    DomainBusy,
    DomainUnknown,
    GraincopyError,
    HypervisorDown,
    HypervisorRefused,
    ToolMissing,
)

_PAUSE = 0.1  # seconds between two attempts to reach a daemon that is being restarted

T = TypeVar("T")


def binding() -> Any:
    """The module ``libvirt``, and quiet: it would print every error. Raises ToolMissing."""
    try:
        import libvirt
    except ImportError as failure:
        install = "apt-get install python3-libvirt, or pip install 'graincopy[libvirt]'"
        raise ToolMissing(tool="the Python binding of libvirt", install=install) from failure
    libvirt.registerErrorHandler(_quiet, None)
    return libvirt


def _quiet(_context: object, _error: object) -> None:
    """libvirt's own printing of errors; they come as exceptions as well."""


class Link:
    """libvirt at ``uri``. Connects when first used; ``patience`` seconds are given to a daemon that restarts."""

    def __init__(self, uri: str, clock: Clock, patience: float = 5.0) -> None:
        self.uri = uri
        self._clock = clock
        self._patience = patience
        self._connection: Any = None

    def call(self, action: Callable[[Any], T], *, domain: str = "", again: bool = True) -> T:
        """``action`` of the virConnect, what it raises turned into our errors.

        When the connection broke it is made anew and ``action`` is called once more, unless ``again`` is false: then
        it may have had its effect. Raises ToolMissing, HypervisorDown, DomainUnknown, DomainBusy, AgentFailed,
        HypervisorRefused.
        """
        libvirt = binding()
        fresh = self._connection is None
        try:
            return action(self._connected(libvirt))
        except libvirt.libvirtError as failure:
            if not broken(libvirt, failure):
                raise self.error(failure, domain) from failure
            self.close()
            if fresh or not again:
                raise self.error(failure, domain) from failure
        try:
            return action(self._connected(libvirt))
        except libvirt.libvirtError as failure:
            raise self.error(failure, domain) from failure

    def domain(self, name: str, action: Callable[[Any], T], *, again: bool = True, shown: str = "") -> T:
        """``action`` of the virDomain called ``name``, or with that UUID; errors call it ``shown``. As :meth:`call`."""
        return self.call(lambda connection: action(_look_up(connection, name)), domain=shown or name, again=again)

    def close(self) -> None:
        """Let the connection go; may be repeated. The next question makes another one."""
        connection, self._connection = self._connection, None
        if connection is not None:
            with contextlib.suppress(binding().libvirtError):
                connection.close()

    def __enter__(self) -> Link:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def error(self, failure: Any, domain: str = "") -> GraincopyError:
        """Our error for a libvirtError that was raised in a question about ``domain``."""
        libvirt = binding()
        code, reason = failure.get_error_code(), _sentence(failure)
        if code == libvirt.VIR_ERR_NO_DOMAIN:
            return DomainUnknown(uri=self.uri, domain=domain)
        if broken(libvirt, failure):
            return HypervisorDown(uri=self.uri, reason=reason)
        if code in _agent_codes(libvirt):
            return AgentFailed(domain=domain, reason=reason)
        if code in (libvirt.VIR_ERR_OPERATION_TIMEOUT, libvirt.VIR_ERR_RESOURCE_BUSY):
            return DomainBusy(domain=domain, reason=reason)
        return HypervisorRefused(uri=self.uri, reason=reason)

    def _connected(self, libvirt: Any) -> Any:
        """The connection that is there, or a new one; a daemon that is just starting is waited for a little."""
        if self._connection is not None:
            return self._connection
        give_up = self._clock.monotonic() + self._patience
        while True:
            try:
                self._connection = libvirt.open(self.uri)
            except libvirt.libvirtError as failure:
                if self._clock.monotonic() >= give_up:
                    raise HypervisorDown(uri=self.uri, reason=_sentence(failure)) from failure
                self._clock.sleep(_PAUSE)
            else:
                return self._connection


def _look_up(connection: Any, name: str) -> Any:
    """By name first: a name may look like a UUID, not the other way round."""
    libvirt = binding()
    try:
        return connection.lookupByName(name)
    except libvirt.libvirtError as failure:
        if failure.get_error_code() != libvirt.VIR_ERR_NO_DOMAIN:
            raise
    try:
        return connection.lookupByUUIDString(name)
    except libvirt.libvirtError as failure:
        # What is no UUID at all is only another name that is not there.
        if failure.get_error_code() == libvirt.VIR_ERR_INVALID_ARG:
            return connection.lookupByName(name)
        raise


def broken(libvirt: Any, failure: Any) -> bool:
    """Whether the connection itself, and not what was asked, is the trouble."""
    code = failure.get_error_code()
    if code in (libvirt.VIR_ERR_NO_CONNECT, libvirt.VIR_ERR_INVALID_CONN, libvirt.VIR_ERR_AUTH_FAILED):
        return True
    transport = (libvirt.VIR_FROM_RPC, libvirt.VIR_FROM_REMOTE, libvirt.VIR_FROM_STREAMS)
    inner = (libvirt.VIR_ERR_SYSTEM_ERROR, libvirt.VIR_ERR_INTERNAL_ERROR, libvirt.VIR_ERR_RPC)
    return failure.get_error_domain() in transport and code in inner


def _agent_codes(libvirt: Any) -> tuple[int, ...]:
    names = ("VIR_ERR_AGENT_UNRESPONSIVE", "VIR_ERR_AGENT_UNSYNCED", "VIR_ERR_AGENT_COMMAND_TIMEOUT")
    return tuple(getattr(libvirt, name) for name in (*names, "VIR_ERR_AGENT_COMMAND_FAILED") if hasattr(libvirt, name))


def _sentence(failure: Any) -> str:
    """libvirt's message, without the line breaks and the full stop."""
    return " ".join(str(failure.get_error_message() or failure).split()).rstrip(".")
