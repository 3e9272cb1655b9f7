"""A small stand-in of the Hugging Face hub's API for data sets, as files of a `serving.Server`."""

import json
from collections.abc import Mapping

COMMIT = "0" * 40


def hub_files(repository: str, files: Mapping[str, bytes], revision: str = "main") -> dict[str, bytes]:
    """By path: whether the repository and the revision exist, the tree of its folders, and the files themselves."""
    about = {"id": repository, "sha": COMMIT, "private": False, "tags": [], "downloads": 0, "likes": 0, "siblings": []}
    api = f"/api/datasets/{repository}"
    served = {f"{api}": json.dumps(about).encode(), f"{api}/revision/{revision}": json.dumps(about).encode()}
    folders = {path.rpartition("/")[0] for path in files}
    for folder in folders:
        entries = [
            {"type": "file", "path": path, "size": len(content), "oid": COMMIT}
            for path, content in files.items()
            if path.rpartition("/")[0] == folder
        ]
        served[f"{api}/tree/{revision}/{folder}".rstrip("/")] = json.dumps(entries).encode()
    return served | {f"/datasets/{repository}/resolve/{revision}/{path}": content for path, content in files.items()}
