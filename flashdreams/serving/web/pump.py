"""The thread that encodes a session's pictures when they are due."""

import logging
import threading

from flashdreams.serving.web.codec import Encoder
from flashdreams.serving.web.feed import Feed
from flashdreams.serving.web.metrics import Metrics
from flashdreams.serving.web.outlet import Outlet

logger = logging.getLogger(__name__)


class Pump:
    """Takes pictures from a feed, encodes them and passes them to one socket.

    A picture that is too much for a slow client is dropped before it is encoded, so that later
    pictures still refer only to pictures that the client has.
    """

    def __init__(self, feed: Feed, outlet: Outlet, encoder: Encoder, metrics: Metrics) -> None:
        """Start the thread; it ends when the socket is replaced or there are no more pictures."""
        self._feed, self._outlet, self._encoder, self._metrics = feed, outlet, encoder, metrics
        outlet.encoder = encoder
        threading.Thread(target=self._run, name="flashdreams-encoder", daemon=True).start()

    def _run(self) -> None:
        feed, outlet = self._feed, self._outlet
        unshown = round(feed.settings.unshown_s * feed.offer.fps)
        key, picture = True, None
        try:
            while (picture := feed.take(outlet)) is not None:
                if outlet.behind(unshown):
                    feed.skip(picture)
                    continue
                key = outlet.take_key() or key
                with self._metrics.encode.time():
                    data, is_key = self._encoder.encode(picture.pixels, key=key)
                key = not feed.send(picture, data, is_key, outlet)
        except Exception:
            logger.exception("encoding for one client has failed")
            outlet.failed = True
            if picture is not None:
                feed.skip(picture)
        outlet.finish()
