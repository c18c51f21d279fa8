"""gcsfs' file system as a run needs it: it sees what other machines write, and all of
its failures are OSErrors, as those of disks."""

import logging
from typing import Any

import gcsfs
from fsspec.asyn import sync_wrapper

from sra2_jax.errors import one_line

for client in ("fsspec", "gcsfs"):  # they log what they raise, with tracebacks
    logging.getLogger(client).setLevel(logging.CRITICAL)


class Bucket(gcsfs.GCSFileSystem):  # type: ignore[misc]
    """gs://. Answers of 408, 429 and 5xx are asked again for half a minute."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named | {"use_listings_cache": False})

    async def _call(self, *arguments: Any, **named: Any) -> Any:
        try:
            return await super()._call(*arguments, **named)
        except FileNotFoundError:
            raise
        except Exception as error:  # HttpError, aiohttp's, google.auth's, requests'
            raise OSError(one_line(error)) from error

    call = sync_wrapper(_call)  # what open files use; the parent's would not come here
