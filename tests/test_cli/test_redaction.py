"""Secrets in addresses never reach what is printed or recorded."""

from __future__ import annotations

import pytest

from console.output import redact, redact_values, secrets_of

SECRET = "s3cr3t"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("mysql://u:s3cr3t@host:3306/db", "mysql://u:***@host:3306/db"),
        ("mysql+pymysql://host/db?user=u&password=s3cr3t&charset=utf8", None),
        ("postgresql://host/db?sslpassword=s3cr3t&sslmode=require", None),
        ("mssql+pyodbc:///?odbc_connect=DRIVER%3D..PWD%3Ds3cr3t", None),
        ("mysql://u:p@ss/s3cr3t@host/db", "mysql://u:***@host/db"),
        ("mysql://root@host/db", "mysql://root@host/db"),
        ("https://s3cr3t@host/store.zarr", "https://***@host/store.zarr"),
        (
            "https://host/s.zarr?X-Amz-Signature=s3cr3t&X-Amz-Date=1",
            "https://host/s.zarr?X-Amz-Signature=***&X-Amz-Date=1",
        ),
        ("https://host/s?sv=1&sig=s3cr3t%3D&se=2", "https://host/s?sv=1&sig=***&se=2"),
        ("https://host/s?mail=a@b&token=s3cr3t", "https://host/s?mail=a@b&token=***"),
        ("https://u:s3cr3t@host/s?mail=a@b", "https://u:***@host/s?mail=a@b"),
        ("https://host/cb#access_token=s3cr3t", "https://host/cb#access_token=***"),
        ("tls://u:s3cr3t@scheduler:8786", "tls://u:***@scheduler:8786"),
        ("simplecache::s3://k:s3cr3t@bucket/x", "simplecache::s3://k:***@bucket/x"),
        (
            "cannot open 'https://host/x?api_key=s3cr3t': refused",
            "cannot open 'https://host/x?api_key=***': refused",
        ),
        ("cli extract 'mysql://u:s3cr3t@h/d?password=s3cr3t' --out x", None),
        ("http://localhost:8080/api and a@b.c", "http://localhost:8080/api and a@b.c"),
        ("password=1 without an address", "password=1 without an address"),
        ("s3://bucket/keys/tokens.zarr", "s3://bucket/keys/tokens.zarr"),
        ("https://host/x?page=2&epochs=3", "https://host/x?page=2&epochs=3"),
    ],
)
def test_secrets_are_hidden_and_the_rest_stays(text: str, expected: str | None) -> None:
    found = redact(text)
    assert SECRET not in found
    assert redact(found) == found
    if expected is None:
        assert "***" in found
    else:
        assert found == expected


def test_values_of_json() -> None:
    value = {"store": "s3://k:s3cr3t@b/x", "n": 3, "list": ["https://h?token=s3cr3t", None], "t": ("a", 1.5)}
    assert redact_values(value) == {
        "store": "s3://k:***@b/x",
        "n": 3,
        "list": ["https://h?token=***", None],
        "t": ["a", 1.5],
    }


def test_secrets_as_a_library_would_repeat_them() -> None:
    found = secrets_of("mysql://u:p%40ss@h/d?password=s3cr3t")
    assert set(found) == {"s3cr3t", "p%40ss", "p@ss"}
    assert found[-1] == "p@ss"  # the longest first: one may be part of another
    assert secrets_of("mysql://u@h/d?charset=utf8") == []
