"""Names for join links, in the user's configuration file: `swarm join LINK --as home`, then `--join home`.

    <configuration>/config.toml        mode 0600, as links into private swarms are secret
        [swarms.home]
        link = "swarm://v2.…"

The swarms that this computer owns have names as well (swarm/ownership.py).
"""

from __future__ import annotations

from pathlib import Path

import tomlkit
from tomlkit.exceptions import TOMLKitError

from swarm.errors import BadLink, BadRequest, ResourceError
from swarm.files import check_name, default_config_dir, is_name, write_atomically
from swarm.link import JoinLink
from swarm.ownership import open_owned, owned_names


def resolve_join(text: str, config_dir: Path | None = None) -> JoinLink:
    """The join link that a text is, or of which it is the name. Raises: BadLink: neither, or it has expired."""
    name = text.strip()
    if not is_name(name):
        return JoinLink.parse(text)
    config_dir = config_dir or default_config_dir()
    links = saved_links(config_dir)
    if name in links:
        try:
            return JoinLink.parse(links[name])
        except BadLink as exc:
            raise BadLink(f"{name}, in {_path(config_dir)}: {exc}") from exc
    owned = owned_names(config_dir)
    if name in owned:
        return open_owned(config_dir, name).own_link()
    known = f"known names are {', '.join(sorted({*links, *owned}))}" if links or owned else "there are no names yet"
    raise BadLink(
        f"{name!r} is not a join link (swarm://…), and `swarm join LINK --as {name}` was not run here: {known}"
    )


def saved_links(config_dir: Path) -> dict[str, str]:
    """Name -> link, as text. Raises: BadRequest, ResourceError: the file cannot be read."""
    swarms = _read(config_dir).get("swarms", {})
    return {name: str(entry.get("link", "")) for name, entry in swarms.items() if isinstance(entry, dict)}


def save_link(config_dir: Path, name: str, link: JoinLink) -> None:
    """Give a link a name; a newer invitation into the same private swarm takes an older one's place.

    Raises: BadRequest: the name is taken. ResourceError: the file cannot be written.
    """
    check_name(name)
    document = _read(config_dir)
    earlier = saved_links(config_dir).get(name)
    if name in owned_names(config_dir) or (earlier is not None and not _is_same_swarm(earlier, link)):
        raise BadRequest(f"{name} is already the name of another swarm: choose another one with --as NAME")
    swarms = document.setdefault("swarms", tomlkit.table(is_super_table=True))
    swarms.setdefault(name, tomlkit.table())["link"] = link.encode()
    try:
        write_atomically(_path(config_dir), tomlkit.dumps(document).encode())
    except OSError as exc:
        raise ResourceError(f"cannot write {_path(config_dir)}: {exc.strerror or exc}") from exc


def _is_same_swarm(earlier: str, link: JoinLink) -> bool:
    """Whether two links lead into one private swarm, or are the same."""
    try:
        before = JoinLink.parse(earlier, now_s=0.0)
    except BadLink:
        return False
    if before.invitation is None or link.invitation is None:
        return before == link
    return before.invitation.owner_key == link.invitation.owner_key


def _path(config_dir: Path) -> Path:
    return config_dir / "config.toml"


def _read(config_dir: Path) -> tomlkit.TOMLDocument:
    try:
        return tomlkit.parse(_path(config_dir).read_text())
    except FileNotFoundError:
        return tomlkit.document()
    except OSError as exc:
        raise ResourceError(f"cannot read {_path(config_dir)}: {exc.strerror or exc}") from exc
    except (TOMLKitError, UnicodeDecodeError) as exc:
        raise BadRequest(f"{_path(config_dir)} is not valid TOML: {exc}") from exc
