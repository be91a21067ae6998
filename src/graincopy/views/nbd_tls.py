"""TLS of the NBD server, from a directory of PEM files named as qemu, nbdkit and libnbd name them.

NBD has no other way of knowing who is asking: where TLS is on, a client shows a certificate of the same authority.
"""

from __future__ import annotations

import os
import ssl

from graincopy.core.errors import TlsUnfit

CA, CERTIFICATE, KEY = "ca-cert.pem", "server-cert.pem", "server-key.pem"


def server_context(folder: str) -> ssl.SSLContext:
    """TLS 1.2 or later, with a client certificate that ``ca-cert.pem`` signed. Raises TlsUnfit."""
    paths = [os.path.join(folder, name) for name in (CA, CERTIFICATE, KEY)]
    for path in paths:
        if not os.access(path, os.R_OK):
            what = "cannot be read" if os.path.exists(path) else "is missing"
            raise TlsUnfit(path=folder, reason=f"{os.path.basename(path)} {what}")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.verify_mode = ssl.CERT_REQUIRED
    try:
        context.load_verify_locations(paths[0])
        context.load_cert_chain(paths[1], paths[2], password=_no_password)
    except OSError as failure:  # ssl.SSLError is one
        raise TlsUnfit(path=folder, reason=failure.strerror or str(failure)) from failure
    return context


def _no_password() -> str:
    """A key with a passphrase is refused instead of asked for on the terminal."""
    return ""
