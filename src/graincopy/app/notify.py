"""Stage 9, to people: what came of a backup goes to apprise URLs. What cannot be delivered fails nothing."""

from __future__ import annotations

import logging
from collections.abc import Sequence


def notify(urls: Sequence[str], title: str, body: str) -> tuple[str, ...]:
    """Send to each URL. Answers one warning for each that could not be delivered; the URL's secrets are not shown."""
    import apprise

    logging.getLogger("apprise").addHandler(logging.NullHandler())  # its complaints become our warnings
    logging.getLogger("apprise").propagate = False
    warnings = []
    for url in urls:
        sender = apprise.Apprise()
        if not sender.add(url) or not sender.notify(title=title, body=body):
            warnings.append(f"no notification could be sent to {url.partition('://')[0]}://…")
    return tuple(warnings)
