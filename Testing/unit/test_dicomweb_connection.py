"""What servers and networks do wrong, on a stand-in for an archive; who we are to it, and to nobody else."""

from __future__ import annotations

import datetime
import ipaddress
import itertools
import json
import pickle
import ssl
import sys
import threading
import time
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest

pytest.importorskip("dicomweb_client", reason="dicomweb-client is missing: pip install dicomweb-client")

import requests
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from images import dicom_dataset, ramp

from MedAnomalyCLIPLib import dicomweb_login, dicomweb_session
from MedAnomalyCLIPLib.cli import EXIT_USER_ERROR, main
from MedAnomalyCLIPLib.dicomweb import Archive, tag
from MedAnomalyCLIPLib.dicomweb_login import Login
from MedAnomalyCLIPLib.dicomweb_sink import StoredInArchive
from MedAnomalyCLIPLib.dicomweb_source import ArchivedSeries, parse_query, search_archive
from MedAnomalyCLIPLib.errors import ArchiveFailed, DependencyMissing, InvalidRequest, UnsupportedImage

TAGS = [
    tag(name)
    for name in ("StudyInstanceUID", "SeriesInstanceUID", "Modality", "SeriesDescription", "SOPInstanceUID")
]
STUDY, SERIES, INSTANCE = "1.2.826.0.1.111", "1.2.826.0.1.222", "1.2.826.0.1.333"
VARIABLES = [
    value for name, value in vars(dicomweb_login).items() if str(value).startswith("MEDANOMALYCLIP_DICOMWEB")
]


class StandIn:
    """A server that gives the answers it was told to give, and keeps what it was asked.

    Attributes:
        answers: for the next requests: status, headers and body each. The last is given for ever.
        asked: path, headers and body of each request.
    """

    def __init__(self):
        self.answers, self.asked = [], []
        stand_in = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self):
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                stand_in.asked.append((self.path, dict(self.headers), body))
                answers = stand_in.answers
                status, headers, body = answers.pop(0) if len(answers) > 1 else answers[0]
                self.send_response(status)
                for name, value in {"Content-Length": str(len(body)), **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(body)
                if headers.get("Content-Length"):
                    self.close_connection = True

            do_POST = do_GET

            def log_message(self, *arguments):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True

    @property
    def url(self):
        scheme = "https" if isinstance(self.server.socket, ssl.SSLSocket) else "http"
        return f"{scheme}://127.0.0.1:{self.server.server_port}/dicom-web"


@contextmanager
def serving(tls=None):
    stand_in = StandIn()
    if tls:
        stand_in.server.socket = tls.wrap_socket(stand_in.server.socket, server_side=True)
    thread = threading.Thread(target=stand_in.server.serve_forever, args=(0.02,))
    thread.start()
    yield stand_in
    stand_in.server.shutdown()
    thread.join()
    stand_in.server.server_close()


@pytest.fixture(autouse=True)
def a_bare_environment(monkeypatch, tmp_path):
    for name in (*VARIABLES, "REQUESTS_CA_BUNDLE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    monkeypatch.setitem(sys.modules, "keyring", None)  # which a developer's computer may have


@pytest.fixture
def server():
    with serving() as stand_in:
        yield stand_in


@pytest.fixture
def quick(monkeypatch):
    """Waits between tries that are too short for a person."""
    monkeypatch.setattr(dicomweb_session, "_WAIT", 0.01)


def said(*found, status=200, **headers):
    return status, {"Content-Type": "application/dicom+json", **headers}, json.dumps(found).encode()


def study(uid=STUDY):
    return {"0020000D": {"vr": "UI", "Value": [uid]}}


def studies(server):
    return list(Archive(server.url).connect().studies({}))


def multipart(*parts):
    body = b"".join(b"\r\n--part\r\nContent-Type: application/dicom\r\n\r\n" + part for part in parts)
    return (
        200,
        {"Content-Type": 'multipart/related; type="application/dicom"; boundary=part'},
        body + b"\r\n--part--",
    )


def image_bytes(tmp_path):
    path = tmp_path / "image"
    dicom_dataset(ramp()[0], SOPInstanceUID=INSTANCE).save_as(path, enforce_file_format=True)
    return path.read_bytes()


def series(server, **facts):
    return ArchivedSeries(Archive(server.url), STUDY, SERIES, "CT", **facts)


# What is tried again


@pytest.mark.parametrize("status", [429, 502, 503, 504])
def test_a_busy_server_is_asked_again(server, quick, status):
    server.answers = [(status, {}, b""), (status, {}, b""), said(study()), said()]
    assert studies(server) == [study()]
    assert len(server.asked) == 4


def test_waits_grow_and_a_server_may_say_how_long(server, monkeypatch):
    monkeypatch.setattr(dicomweb_session, "_WAIT", 0.1)
    server.answers = [(503, {}, b""), (503, {}, b""), (503, {"Retry-After": "1"}, b""), said()]
    began = time.monotonic()
    studies(server)
    assert time.monotonic() - began > 0.2 + 1
    assert dicomweb_session._TRIES * 0.5 * 2**dicomweb_session._TRIES < 120  # seconds before it is given up


def test_results_are_sent_again_whole(server, quick, tmp_path):
    image_bytes(tmp_path)
    server.answers = [(503, {}, b""), (200, {"Content-Type": "application/dicom+json"}, b"{}")]
    Archive(server.url).connect().store(STUDY, [tmp_path / "image"])
    (first, second) = server.asked
    assert first[0].endswith(f"/studies/{STUDY}")
    assert first[2] == second[2]
    assert len(first[2]) > (tmp_path / "image").stat().st_size


def test_what_stays_busy_is_given_up(server, quick):
    server.answers = [(503, {}, b"")]
    with pytest.raises(ArchiveFailed, match="503 Service Unavailable"):
        studies(server)
    assert len(server.asked) == 1 + dicomweb_session._TRIES


def test_a_wrong_password_is_not_tried_again(server):
    server.answers = [(401, {}, b"")]
    with pytest.raises(ArchiveFailed, match="are the credentials there and right"):
        studies(server)
    assert len(server.asked) == 1


def test_a_server_that_is_not_there_is_told(quick):
    with serving() as gone:
        pass
    with pytest.raises(ArchiveFailed, match="cannot be reached"):
        studies(gone)


# What is not understood, not whole, or too much


@pytest.mark.parametrize(
    "answer",
    [
        (200, {"Content-Type": "text/html"}, b"<html>Please log in</html>"),
        said(3),
        (200, {"Content-Type": "application/dicom+json"}, b"\xff\xfe"),
    ],
    ids=["a page", "a number", "bytes"],
)
def test_an_answer_that_is_none_is_told(server, answer):
    server.answers = [answer]
    with pytest.raises(ArchiveFailed, match="not understood"):
        studies(server)


@pytest.mark.parametrize(
    "answer",
    [
        (404, {}, b""),
        (200, {"Content-Type": "text/html"}, b"<html>Please log in</html>"),
        multipart(b"no DICOM"),
        (200, {"Content-Type": "multipart/related; boundary=part", "Content-Length": "99999"}, b"--part\r\n"),
    ],
    ids=["gone", "a page", "no DICOM", "broken off"],
)
def test_a_series_that_is_none_is_told_and_leaves_nothing(server, answer, tmp_path, quick):
    server.answers = [answer]
    with pytest.raises(ArchiveFailed) as caught:
        Archive(server.url).connect().fetch(STUDY, SERIES, tmp_path)
    assert STUDY not in str(caught.value)
    assert SERIES not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_a_series_that_is_not_whole_is_refused(server, tmp_path):
    server.answers = [multipart(image_bytes(tmp_path))]
    with pytest.raises(ArchiveFailed, match="sent 1 of the 2 files"), series(server, images=2).opened(None):
        pass
    with series(server, images=1).opened(None) as volume:
        assert volume.size == (5, 4, 1)


def test_an_answer_without_end_is_cut_off(server, monkeypatch, tmp_path):
    server.answers = [multipart(b"x" * 50_000)]
    monkeypatch.setenv("MEDANOMALYCLIP_LIMITS", "fetched_bytes=40000")
    with pytest.raises(UnsupportedImage, match="40,000"):
        Archive(server.url).connect().fetch(STUDY, SERIES, tmp_path)
    monkeypatch.setenv("MEDANOMALYCLIP_LIMITS", "text_bytes=1000")
    server.answers = [said(*[study()] * 100)]
    with pytest.raises(UnsupportedImage, match="1,000"):
        studies(server)


def test_packed_answers_count_unpacked(server, monkeypatch):
    import gzip

    packed = gzip.compress(json.dumps([study()] * 1000).encode())
    assert len(packed) < 1000
    server.answers = [(200, {"Content-Type": "application/dicom+json", "Content-Encoding": "gzip"}, packed)]
    monkeypatch.setenv("MEDANOMALYCLIP_LIMITS", "text_bytes=1000")
    with pytest.raises(UnsupportedImage):
        studies(server)


def test_an_archive_that_begins_anew_for_each_page_is_left(server):
    server.answers = [said(study("1.2.3"), study("1.2.4"))]
    assert len(studies(server)) == 2


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=4),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.fixed_dictionaries({"vr": st.sampled_from(["SQ", "UI", "PN"]), "Value": inner | st.lists(inner)})
        | st.dictionaries(st.sampled_from([*TAGS, "Value"]), inner, max_size=4)
    ),
    max_leaves=12,
)


attributes = st.dictionaries(st.sampled_from(TAGS), anything)
known = attributes.map(lambda found: {**found, **study(), TAGS[1]: study()[TAGS[0]]})


@given(answers=st.lists(st.lists(known) | st.lists(attributes | anything), min_size=4))
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_whatever_an_archive_tells_is_used_or_refused(server, answers):
    told = [said(study()), said(study(SERIES)), *(said(*answer) for answer in answers)]
    item = series(server)
    for call in (
        lambda: list(itertools.islice(search_archive(Archive(server.url), {}), 50)),
        lambda: StoredInArchive(("segmentation", "report")).has(item, "0" * 64),
    ):
        server.answers = [*told[: len(answers) % 3], *told[2:], said()]
        with suppress(ArchiveFailed, InvalidRequest):
            call()


# What is stored


def stored(*failures):
    reasons = [{"00081197": {"vr": "US", "Value": [reason]}} for reason in failures]
    return {"00081198": {"vr": "SQ", "Value": reasons}} if failures else {}


@pytest.mark.parametrize("status", [200, 202, 409])
def test_results_that_are_refused_are_told_with_the_reason(server, status, tmp_path):
    image_bytes(tmp_path)
    server.answers = [
        (status, {"Content-Type": "application/dicom+json"}, json.dumps(stored(0xA700)).encode())
    ]
    with pytest.raises(ArchiveFailed, match=r"did not store 1 of 1 results \(failure 0xA700\)"):
        Archive(server.url).connect().store(STUDY, [tmp_path / "image"])


@pytest.mark.parametrize("status", [202, 409])
def test_results_that_are_there_are_not_refused(server, status, tmp_path):
    image_bytes(tmp_path)
    server.answers = [
        (status, {"Content-Type": "application/dicom+json"}, json.dumps(stored(0x0111)).encode())
    ]
    Archive(server.url).connect().store(STUDY, [tmp_path / "image"])


def test_many_results_are_sent_in_parts_in_their_order(server, tmp_path, monkeypatch):
    from MedAnomalyCLIPLib import dicomweb

    content = image_bytes(tmp_path)
    monkeypatch.setattr(dicomweb, "_REQUEST_BYTES", 2 * len(content))
    server.answers = [(200, {"Content-Type": "application/dicom+json"}, b"{}")]
    Archive(server.url).connect().store(STUDY, [tmp_path / "image"] * 5)
    assert [body.count(b"DICM") for _, _, body in server.asked] == [2, 2, 1]


# Who we are


def test_a_token_is_sent(server, monkeypatch):
    monkeypatch.setenv("MEDANOMALYCLIP_DICOMWEB_TOKEN", "t0ken")
    server.answers = [said()]
    studies(server)
    assert server.asked[0][1]["Authorization"] == "Bearer t0ken"
    assert server.asked[0][1]["Host"] == server.url.split("/")[2]


def test_neither_token_nor_images_go_to_another_server(server, monkeypatch, tmp_path):
    monkeypatch.setenv("MEDANOMALYCLIP_DICOMWEB_TOKEN", "t0ken")
    image_bytes(tmp_path)
    with serving() as other:
        other.answers = [said()]
        server.answers = [(307, {"Location": other.url}, b"")]
        with pytest.raises(ArchiveFailed, match="another server"):
            studies(server)
        with pytest.raises(ArchiveFailed, match="another server"):
            Archive(server.url).connect().store(STUDY, [tmp_path / "image"])
        assert other.asked == []


def test_a_server_of_a_similar_name_is_another(monkeypatch):
    session = dicomweb_session.open_session("https://pacs.example/dicom-web", Login())
    assert session.get_adapter("https://pacs.example/anything")
    for address in ("https://pacs.example.org/", "https://pacs.example:444/", "http://pacs.example/"):
        with pytest.raises(requests.exceptions.InvalidSchema):
            session.get_adapter(address)


def test_password_and_user_may_be_in_the_keyring(server, monkeypatch):
    asked = []

    def get_credential(service, user):
        asked.append((service, user))
        return SimpleNamespace(username="reader", password="kept")

    errors = SimpleNamespace(KeyringError=OSError)
    keyring = SimpleNamespace(get_credential=get_credential, errors=errors)
    monkeypatch.setitem(sys.modules, "keyring", keyring)
    monkeypatch.setitem(sys.modules, "keyring.errors", errors)
    server.answers = [said()]
    studies(server)
    monkeypatch.setenv("MEDANOMALYCLIP_DICOMWEB_USER", "reader")
    studies(server)
    assert asked == [(server.url, None), (server.url, "reader")]
    assert {headers["Authorization"] for _, headers, _ in server.asked} == {"Basic cmVhZGVyOmtlcHQ="}


def test_a_computer_without_keyring_has_no_password(server):
    server.answers = [said()]
    studies(server)
    assert "Authorization" not in server.asked[0][1]


@pytest.mark.parametrize(
    "variables",
    [{"TOKEN": "a", "USER": "b"}, {"PASSWORD": "a"}, {"KEY": "a"}, {"CA": "none.pem"}, {"CERT": "none.pem"}],
    ids=str,
)
def test_credentials_that_contradict_each_other_are_refused(variables, monkeypatch):
    for name, value in variables.items():
        monkeypatch.setenv(f"MEDANOMALYCLIP_DICOMWEB_{name}", value)
    with pytest.raises(InvalidRequest, match="MEDANOMALYCLIP_DICOMWEB_"):
        Archive("https://pacs.example").connect()


def test_no_credentials_are_told_by_what_may_be_printed_or_sent(monkeypatch):
    login = Login("t0ken", "reader", "secret", "cert", "key", "ca")
    assert not any(word in repr(login) for word in ("t0ken", "secret", "reader"))
    assert b"secret" not in pickle.dumps(Archive("https://pacs.example"))


# Where it is


@pytest.mark.parametrize(
    "url",
    [
        "https://pacs.example/dicom-web/",
        "http://localhost:8042/dicom-web",
        "http://127.0.0.2",
        "http://[::1]:8042",
    ],
)
def test_encrypted_addresses_and_those_of_this_computer_are_taken(url):
    assert Archive(url).url == url.rstrip("/")


@pytest.mark.parametrize("url", ["http://pacs.example", "http://10.0.0.1:8042", "http://localhost.example"])
def test_others_are_taken_only_when_the_user_says_so(url):
    with pytest.raises(InvalidRequest, match="--allow-http"):
        Archive(url)
    assert Archive(url, allow_http=True).url == url


@pytest.mark.parametrize(
    "url",
    [
        "pacs.example",
        "ftp://pacs.example",
        "https://",
        "https://pacs:port",
        "https://pacs.example?key=s3cret",
    ],
)
def test_what_is_no_address_is_refused(url):
    with pytest.raises(InvalidRequest, match=r"https://pacs\.example/dicom-web") as caught:
        Archive(url)
    assert "s3cret" not in str(caught.value)


def test_a_password_in_the_address_is_refused_and_not_repeated(tmp_path, capfd):
    words = ["batch", "--dicomweb", "https://reader:s3cret@pacs.example", "--output", str(tmp_path / "out")]
    assert main(words) == EXIT_USER_ERROR
    told = capfd.readouterr()
    assert "environment variables" in told.err
    assert "s3cret" not in told.out + told.err


@pytest.mark.parametrize("word", ["StudyDate", "StudyDate=", "=1", "Colour=red", "limit=5"])
def test_a_query_of_other_words_is_refused(word):
    with pytest.raises(InvalidRequest, match="DICOM keywords"):
        parse_query([word])


def test_a_query_may_hold_what_addresses_give_a_meaning_to(server):
    server.answers = [said()]
    with pytest.raises(InvalidRequest, match="no series"):
        list(search_archive(Archive(server.url), parse_query(["PatientName=DOE^JANE & CO=1*"])))
    assert "PatientName=DOE%5EJANE+%26+CO%3D1%2A" in server.asked[0][0]


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["IN", "--dicomweb", "https://pacs.example"],
        ["IN", "--query", "Modality=CT"],
        ["IN", "--allow-http"],
    ],
    ids=str,
)
def test_files_and_an_archive_are_not_mixed(words, tmp_path, capsys):
    line = [
        "batch",
        "--output",
        str(tmp_path / "out"),
        *(word.replace("IN", str(tmp_path)) for word in words),
    ]
    assert main(line) == EXIT_USER_ERROR
    assert "--dicomweb URL" in capsys.readouterr().err


def test_a_missing_package_is_told(monkeypatch):
    monkeypatch.setitem(sys.modules, "dicomweb_client", None)
    with pytest.raises(DependencyMissing, match="pip install dicomweb-client"):
        Archive("https://missing.example").connect()


def test_libraries_print_nothing_of_what_is_asked_for(server, quick, capfd):
    server.answers = [(503, {"Warning": f"299 {STUDY}"}, b""), said(study(), Warning=f"299 {STUDY}"), said()]
    assert studies(server)
    printed = capfd.readouterr()
    assert printed.out + printed.err == ""


# Encryption


@pytest.fixture(scope="module")
def certificates(tmp_path_factory):
    """PEM files: an authority, and a certificate with key that it gave to this computer, and to us."""
    pytest.importorskip("cryptography", reason="cryptography is missing: pip install cryptography")
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

    folder = tmp_path_factory.mktemp("certificates")
    today = datetime.datetime.now(datetime.timezone.utc)
    root = ec.generate_private_key(ec.SECP256R1())
    for name in ("authority", "server", "client"):
        key = root if name == "authority" else ec.generate_private_key(ec.SECP256R1())
        made = (
            x509.CertificateBuilder()
            .subject_name(x509.Name.from_rfc4514_string(f"CN={name}"))
            .issuer_name(x509.Name.from_rfc4514_string("CN=authority"))
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(today - datetime.timedelta(days=1))
            .not_valid_after(today + datetime.timedelta(days=1))
            .add_extension(x509.BasicConstraints(ca=name == "authority", path_length=None), critical=True)
            .add_extension(
                x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]),
                critical=False,
            )
            .sign(root, hashes.SHA256())
        )
        (folder / f"{name}.pem").write_bytes(made.public_bytes(Encoding.PEM))
        private = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        (folder / f"{name}.key").write_bytes(private)
    return folder


@pytest.fixture
def encrypted(certificates):
    """A server that takes only clients with a certificate of the authority."""
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(certificates / "server.pem", certificates / "server.key")
    tls.load_verify_locations(certificates / "authority.pem")
    tls.verify_mode = ssl.CERT_REQUIRED
    tls.maximum_version = ssl.TLSVersion.TLSv1_2  # which tells at once that a client is refused
    with serving(tls) as stand_in:
        stand_in.server.handle_error = lambda *arguments: None
        stand_in.answers = [said(study()), said()]
        yield stand_in


def test_both_sides_prove_who_they_are(encrypted, certificates, monkeypatch):
    monkeypatch.setenv(
        "REQUESTS_CA_BUNDLE", str(certificates / "client.pem")
    )  # of others: ours stands above it
    monkeypatch.setenv("MEDANOMALYCLIP_DICOMWEB_CA", str(certificates / "authority.pem"))
    monkeypatch.setenv("MEDANOMALYCLIP_DICOMWEB_CERT", str(certificates / "client.pem"))
    monkeypatch.setenv("MEDANOMALYCLIP_DICOMWEB_KEY", str(certificates / "client.key"))
    assert studies(encrypted) == [study()]


def test_a_server_that_cannot_prove_who_it_is_gets_nothing(encrypted, certificates, monkeypatch):
    monkeypatch.setenv("MEDANOMALYCLIP_DICOMWEB_TOKEN", "t0ken")
    with pytest.raises(ArchiveFailed, match="MEDANOMALYCLIP_DICOMWEB_CA"):
        studies(encrypted)
    assert encrypted.asked == []


def test_a_client_certificate_that_is_missing_is_told(encrypted, certificates, monkeypatch, quick):
    monkeypatch.setenv("MEDANOMALYCLIP_DICOMWEB_CA", str(certificates / "authority.pem"))
    with pytest.raises(ArchiveFailed):
        studies(encrypted)
    assert encrypted.asked == []
