"""The thread that encodes a session's pictures when they are due."""

import logging

from flashdreams.serving.web.codec import Encoder
from flashdreams.serving.web.feed import Feed
from flashdreams.serving.web.outlet import Outlet

logger = logging.getLogger(__name__)


def pump(feed: Feed, outlet: Outlet, encoder: Encoder) -> None:
    """Pass the pictures of a feed to one socket, until it is replaced or there are no more.

    A picture that is too much for a slow client is dropped before it is encoded, so that later
    pictures still refer only to pictures that the client has.
    """
    outlet.encoder = encoder
    unshown = round(feed.settings.unshown_s * feed.offer.fps)
    key, picture = True, None
    try:
        while (picture := feed.take(outlet)) is not None:
            if outlet.behind(unshown):
                feed.skip(picture)
                continue
            key = outlet.take_key() or key
            with feed.metrics.encode.time():
                data, is_key = encoder.encode(picture.pixels, key=key)
            key = not feed.send(picture, data, is_key, outlet)
    except Exception:
        logger.exception("encoding for one client has failed")
        outlet.failed = True
        if picture is not None:
            feed.skip(picture)
    outlet.finish()
