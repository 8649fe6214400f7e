"""URLs of the platform, and databases instead of folders."""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from backend.task.errors import OptionError
from backend.task.request import TaskRequest, read_request
from backend.task.safety import check_database_url, is_link_local
from tests.test_backend.platform_site import Site
from tests.test_backend.refusals import problem


@pytest.mark.parametrize(
    "url",
    [
        "ftp://h/",
        "file:///etc/passwd",
        "//h",
        "h:8080",
        "http://",
        "http://user:secret@h/",
        "http://h/?a=1",
        "http://h/#a",
        "http://h:99999/",
        "http://h:0/",
        "http://[::1",
        "http://a b/",
        "http://169.254.169.254/latest",
        "http://[fe80::1]/",
        "http://[::ffff:169.254.169.254]/",
        "http://2852039166/",
        "http://0xa9fea9fe/",
        "http://169.254.43518/",
        "http://[fd00:ec2::254]/",
        "http://[fd00:0ec2:0:0:0:0:0:254]/",
        "http://100.100.100.200/",
        "http://1684301000/",
        "http://[::ffff:100.100.100.200]/",
        "http://[::ffff:6464:64c8]/",
        "http://[64:ff9b::6464:64c8]/",
        "http://[::100.100.100.200]/",
        "http://192.0.0.192/",
        "http://0xc00000c0/",
        "http://0300.0.0.0300/",
        "http://192.0.0.192./",
        "http://１９２.0.0.192/",
        "http://[2002:a9fe:a9fe::1]/",
        "javascript:alert(1)",
    ],
)
def test_urls_that_are_refused(site: Site, url: str) -> None:
    text = problem(site.words(api_base_url=url))
    assert text.startswith("--api_base_url: ")
    assert "secret" not in text


@pytest.mark.parametrize(
    "url",
    [
        "http://localhost:8080/api",
        "http://127.0.0.1:1",
        "http://192.168.1.5/api/",
        "http://10.0.0.1",
        "https://例子.cn/a",
        "http://[::1]:80",
    ],
)
def test_urls_of_platforms(site: Site, url: str) -> None:
    assert read_request(site.words(api_base_url=url)).api_base_url == url.rstrip("/")


@pytest.mark.parametrize("address", ["169.254.169.254", "100.100.100.200", "192.0.0.192", "fd00:ec2::254"])
def test_whatever_the_resolver_takes_for_the_address_is_refused(address: str) -> None:
    """The system's own resolver reads decimal, octal, hexadecimal and short forms: so does the filter."""
    version = ipaddress.ip_address(address)
    number, forms = int(version), [address]
    if version.version == 4:
        octets = [int(part) for part in address.split(".")]
        forms += [str(number), hex(number), f"0{number:o}", f"::ffff:{address}"]
        forms += [".".join(f"0{part:o}" for part in octets), ".".join(hex(part) for part in octets)]
        forms += [f"{octets[0]}.{number & 0xFFFFFF}", f"{octets[0]}.{octets[1]}.{number & 0xFFFF}"]
    else:
        forms += [version.exploded, address.upper()]
    for form in forms:
        found = socket.getaddrinfo(form, 80, type=socket.SOCK_STREAM)
        assert is_link_local(form), form
        assert all(is_link_local(str(entry[4][0])) for entry in found), form
    near = str(version + 1 if version.version == 6 else ipaddress.ip_address("100.100.100.201"))
    assert not is_link_local(near)


def test_a_database_host_that_resolves_to_a_metadata_service(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    url = "postgresql://u:p@meta.example/db"
    entries = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("100.100.100.200", 0))]
    monkeypatch.setattr("backend.task.safety.socket.getaddrinfo", lambda *_, **__: entries)
    with pytest.raises(OptionError, match=r"link-local host is not allowed, got 'meta\.example'"):
        check_database_url(url, Path("/"))
    assert check_database_url(url, Path("/"), allow_local=True) == url


def test_link_local_when_the_operator_allows_it(site: Site, write: Callable[[str, str], Path]) -> None:
    config = write("p.yml", "distillation:\n  security:\n    allow-local-urls: true\n")
    request = read_request(site.words(api_base_url="http://169.254.1.1", platform_config=config))
    assert request.api_base_url == "http://169.254.1.1"


def with_database(site: Site, **options: object) -> TaskRequest:
    return read_request(site.words(**options))


def test_a_database_instead_of_a_folder(site: Site) -> None:
    url = "mysql+pymysql://user:secret@db:3306/platform?charset=utf8mb4"
    query = "select path, label\nfrom images where dataset_id = :dataset_id"
    request = read_request(site.words(dataset_id="9", dataset_url=url, dataset_query=query))
    assert request.dataset_dir is None
    assert request.database == {
        "url": url,
        "query": "select path, label from images where dataset_id = '9'",
        "image_root": str(site.datasets),
    }
    assert "secret" not in repr(request)


@pytest.mark.parametrize(
    "url",
    [
        "sqlite:////etc/passwd",
        "sqlite:///../x.db",
        "sqlite://",
        "sqlite:///file:/etc/passwd?uri=true",
        "mysql://root@169.254.169.254/x",
        "mysql://root@2852039166/x",
        "mysql://h/x?unix_socket=/run/s",
        "mysql://h/x?read_default_file=/etc/my.cnf",
        "mysql://h/x?local_infile=1",
        "postgresql://h/x?host=/tmp",
        "oracle://h/x",
        "file:///etc/passwd",
        "nonsense",
    ],
)
def test_database_urls_that_are_refused(site: Site, url: str) -> None:
    assert problem(site.words(dataset_url=url, dataset_query="select 1")).startswith("--dataset_url: ")


def test_an_sqlite_file_below_the_data_sets_root(site: Site) -> None:
    url = f"sqlite:///{site.datasets}/images.db"
    assert read_request(site.words(dataset_url=url, dataset_query="select 1")).database["url"] == url


def test_the_yaml_maps_data_sets_to_queries(site: Site, write: Callable[[str, str], Path]) -> None:
    config = write(
        "p.yml",
        """
distillation:
  datasets:
    url: mysql+pymysql://reader:${DB_PASSWORD:pw}@db/platform
    sql:
      "12":
        query: |
          select file_path, label
          from image_12
      "v1.5":
        url: sqlite:////srv/v15.db
        query: select 1
""",
    )
    request = read_request(site.words(dataset_id="12", platform_config=config))
    assert request.database == {
        "url": "mysql+pymysql://reader:pw@db/platform",
        "query": "select file_path, label from image_12",
        "image_root": str(site.datasets),
    }
    assert read_request(site.words(dataset_id="v1.5", platform_config=config)).database["query"] == "select 1"
    assert read_request(site.words(dataset_id="flowers", platform_config=config)).database == {}


def test_the_data_set_in_a_query_is_a_literal(site: Site) -> None:
    query = "select x::text, ':dataset_idx', a from t where d = :dataset_id or e=:dataset_id"
    request = read_request(site.words(dataset_id="花 9", dataset_url="mysql://h/x", dataset_query=query))
    assert request.database["query"] == (
        "select x::text, ':dataset_idx', a from t where d = '花 9' or e='花 9'"
    )


def test_a_query_that_asks_for_an_id_needs_one(site: Site) -> None:
    words = site.words(dataset_id=None, dataset_url="mysql://h/x", dataset_query="select :dataset_id")
    assert problem(words).startswith("--dataset_id: ")
