//! Tokens of every kind of forger, and of those who are who they say. All keys are made here, but for an RSA key, which
//! ring cannot make.

use base64::Engine as _;
use base64::engine::general_purpose::{STANDARD, URL_SAFE_NO_PAD};
use proptest::prelude::*;
use ring::rand::SystemRandom;
use ring::signature::{
    ECDSA_P256_SHA256_ASN1_SIGNING, ECDSA_P256_SHA256_FIXED_SIGNING, EcdsaKeyPair, Ed25519KeyPair, KeyPair,
    RSA_PKCS1_SHA256, RSA_PSS_SHA256, RsaEncoding, RsaKeyPair,
};
use ring::{hmac, rsa};
use rustls::pki_types::PrivatePkcs8KeyDer;
use rustls::pki_types::pem::PemObject;
use serde_json::{Value, json};

use super::core::{Claims, Rules, Tenant};
use super::keys::Algorithm;
use super::*;

/// Unix seconds.
const NOW: i64 = 1_800_000_000;
pub(super) const NOW_NS: i64 = NOW * 1_000_000_000;
pub(super) const SECRET: &[u8] = b"a secret of thirty-two bytes and";
const RS: &str = "https://rs.example";

fn rsa_key() -> RsaKeyPair {
    let pem = include_bytes!("../../../../tests/fixtures/jwt_rsa_2048.pem");
    RsaKeyPair::from_pkcs8(PrivatePkcs8KeyDer::from_pem_slice(pem).unwrap().secret_pkcs8_der()).unwrap()
}

fn rsa_public() -> rsa::PublicKeyComponents<Vec<u8>> {
    rsa_key().public().into()
}

fn ec_key(scheme: &'static ring::signature::EcdsaSigningAlgorithm, pkcs8: &[u8]) -> EcdsaKeyPair {
    EcdsaKeyPair::from_pkcs8(scheme, pkcs8, &SystemRandom::new()).unwrap()
}

fn ec_pkcs8() -> Vec<u8> {
    let made = EcdsaKeyPair::generate_pkcs8(&ECDSA_P256_SHA256_FIXED_SIGNING, &SystemRandom::new()).unwrap();
    made.as_ref().to_vec()
}

fn rules(name: &str, algorithms: &[Algorithm]) -> Rules {
    Rules {
        name: name.into(),
        issuer: format!("https://{name}.example"),
        audience: vec!["api".into(), "api-too".into()],
        algorithms: algorithms.to_vec(),
        leeway: Duration::from_secs(30),
        claims: Claims {
            tenant: Tenant::At("/org/id".into()),
            user: "/sub".into(),
            scopes: Some("/scope".into()),
            tier: Some("/plan".into()),
        },
    }
}

fn fixed(name: &str, algorithms: &[Algorithm], key: Key) -> JwtConfig {
    JwtConfig { rules: rules(name, algorithms), header: http::header::AUTHORIZATION, keys: JwtKeys::Fixed(key) }
}

/// For tests of where tokens stand.
pub fn issuer_at(header: &str) -> JwtConfig {
    let header = http::HeaderName::from_bytes(header.as_bytes()).unwrap();
    JwtConfig { header, ..fixed("hs", &[Algorithm::HS256], Key::secret(SECRET)) }
}

pub(super) fn rs_issuer() -> JwtConfig {
    let public = rsa_public();
    fixed("rs", &[Algorithm::RS256, Algorithm::PS256], Key::rsa(&public.n, &public.e).unwrap())
}

pub(super) fn encode(bytes: impl AsRef<[u8]>) -> String {
    URL_SAFE_NO_PAD.encode(bytes)
}

fn claims() -> Value {
    json!({"iss": RS, "aud": "api", "sub": "alice", "exp": NOW + 600, "nbf": NOW - 10, "iat": NOW - 10,
           "org": {"id": "acme"}, "scope": "openid inference models", "plan": "gold"})
}

/// Good claims, changed; `null` takes one away.
pub(super) fn with(changes: Value) -> String {
    let mut claims = claims();
    for (name, value) in changes.as_object().unwrap() {
        match value {
            Value::Null => drop(claims.as_object_mut().unwrap().remove(name)),
            value => claims[name] = value.clone(),
        }
    }
    claims.to_string()
}

fn sign(header: &str, payload: &str, signer: impl FnOnce(&[u8]) -> Vec<u8>) -> String {
    let signed = format!("{}.{}", encode(header), encode(payload));
    let signature = signer(signed.as_bytes());
    format!("{signed}.{}", encode(signature))
}

fn rs_signed(scheme: &'static dyn RsaEncoding) -> impl FnOnce(&[u8]) -> Vec<u8> {
    move |message| {
        let key = rsa_key();
        let mut signature = vec![0; key.public().modulus_len()];
        key.sign(scheme, &SystemRandom::new(), message, &mut signature).unwrap();
        signature
    }
}

pub(super) fn rs256(header: &str, payload: &str) -> String {
    sign(header, payload, rs_signed(&RSA_PKCS1_SHA256))
}

fn hs(secret: &[u8]) -> impl FnOnce(&[u8]) -> Vec<u8> {
    let key = hmac::Key::new(hmac::HMAC_SHA256, secret);
    move |message| hmac::sign(&key, message).as_ref().to_vec()
}

pub(super) const HEADER: &str = r#"{"alg":"RS256","typ":"JWT"}"#;

pub(super) fn ask(issuers: &Issuers, token: &str) -> Result<Arc<Identity>, &'static str> {
    ask_at(issuers, token, NOW_NS, Instant::now())
}

pub(super) fn ask_at(issuers: &Issuers, token: &str, now_ns: i64, now: Instant) -> Result<Arc<Identity>, &'static str> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(issuers.identify(token, now_ns, now)).map_err(|refusal| refusal.describe().code)
}

fn issuers(configs: &[JwtConfig]) -> Issuers {
    Issuers::default().open(configs).unwrap()
}

#[test]
fn every_forged_token_is_refused_with_its_reason() {
    let ec = ec_pkcs8();
    let es_public = ec_key(&ECDSA_P256_SHA256_FIXED_SIGNING, &ec).public_key().as_ref().to_vec();
    let issuers = issuers(&[
        rs_issuer(),
        fixed("hs", &[Algorithm::HS256], Key::secret(SECRET)),
        fixed("es", &[Algorithm::ES256], Key::ec(&es_public).unwrap()),
    ]);
    let good = || with(json!({}));
    let header = |text: &str| rs256(text, &good());
    let payload = |changes: Value| rs256(HEADER, &with(changes));
    let raw = |text: &str| rs256(HEADER, text);
    let es = |changes: Value, signer: &dyn Fn(&[u8]) -> Vec<u8>| {
        let mut changes = changes;
        changes["iss"] = "https://es.example".into();
        sign(r#"{"alg":"ES256"}"#, &with(changes), signer)
    };
    let token = rs256(HEADER, &good());
    let parts: Vec<&str> = token.split('.').collect();
    let [head, body, mark] = [parts[0], parts[1], parts[2]];
    let modulus = rsa_public().n;
    let pem = STANDARD.encode(&modulus);
    let hs_header = r#"{"alg":"HS256"}"#;
    let at_hs = with(json!({"iss": "https://hs.example"}));
    let flipped = |text: &str| {
        let mut bytes = URL_SAFE_NO_PAD.decode(text).unwrap();
        bytes[7] ^= 1;
        encode(bytes)
    };
    let good_text = good();
    let doubled = |member: &str| format!("{{{member},{}", &good_text[1..]);
    let m = "jwt_malformed";
    let table: Vec<(&str, String, &str)> = vec![
        // Its form
        ("nothing", String::new(), m),
        ("two dots", "..".into(), m),
        ("one part", head.into(), m),
        ("two parts", format!("{head}.{body}"), m),
        ("four parts", format!("{token}.{mark}"), m),
        ("an encrypted token's five parts", format!("{head}.{body}.{mark}.{mark}.{mark}"), m),
        ("padding", format!("{head}=.{body}.{mark}"), m),
        ("padding of the signature", format!("{token}="), m),
        ("the other alphabet", format!("{head}.{body}.{}", mark.replace('-', "+").replace('_', "/") + "+"), m),
        ("a blank", format!("{head}. {body}.{mark}"), m),
        ("a newline at its end", format!("{token}\n"), m),
        ("a NUL", format!("{token}\0"), m),
        ("bits to spare", format!("{head}.{body}.{}B", &mark[..mark.len() - 1]), m),
        ("too long", rs256(HEADER, &with(json!({"more": "x".repeat(9_000)}))), m),
        ("no JSON in its header", header("alg=RS256"), m),
        ("nothing in its header", header(""), m),
        ("a list as its header", header(r#"["RS256","JWT",null,null,null]"#), m),
        ("null as its header", header("null"), m),
        ("a key in its header", header(r#"{"alg":"RS256","jwk":{"kty":"oct","k":"AA"}}"#), m),
        ("where to fetch a key", header(r#"{"alg":"RS256","jku":"https://evil.example/keys"}"#), m),
        ("where to fetch a certificate", header(r#"{"alg":"RS256","x5u":"https://evil.example/c.pem"}"#), m),
        ("a certificate", header(r#"{"alg":"RS256","x5c":["MIIB"]}"#), m),
        ("something critical", header(r#"{"alg":"RS256","crit":["exp"],"exp":1}"#), m),
        ("an empty list of what is critical", header(r#"{"alg":"RS256","crit":[]}"#), m),
        ("an unencoded body", header(r#"{"alg":"RS256","b64":false}"#), m),
        ("a compressed body", header(r#"{"alg":"RS256","zip":"DEF"}"#), m),
        ("a token in a token", header(r#"{"alg":"RS256","cty":"JWT"}"#), m),
        ("an encryption", header(r#"{"alg":"RS256","enc":"A256GCM"}"#), m),
        ("two algorithms", header(r#"{"alg":"RS256","alg":"none"}"#), m),
        ("two key ids", header(r#"{"alg":"RS256","kid":"a","kid":"b"}"#), m),
        ("no algorithm", header(r#"{"typ":"JWT"}"#), m),
        ("a null algorithm", header(r#"{"alg":null}"#), m),
        ("a list of algorithms", header(r#"{"alg":["RS256"]}"#), m),
        ("another type of thing", header(r#"{"alg":"RS256","typ":"JWE"}"#), m),
        ("a number as its type", header(r#"{"alg":"RS256","typ":1}"#), m),
        ("a number as its key id", header(r#"{"alg":"RS256","kid":1}"#), m),
        ("an endless key id", header(&format!(r#"{{"alg":"RS256","kid":"{}"}}"#, "k".repeat(257))), m),
        ("more after its header", header(r#"{"alg":"RS256"}{}"#), m),
        ("no JSON in its body", raw("hello"), m),
        ("a list as its body", raw(&format!(r#"["{RS}","api",{},null,null]"#, NOW + 600)), m),
        ("a number as its body", raw("1"), m),
        ("a body without an end", raw(&"[".repeat(5_000)), m),
        ("more after its body", raw(&format!("{good_text} x")), m),
        // Its algorithm
        ("none", sign(r#"{"alg":"none"}"#, &good(), |_| Vec::new()), "jwt_algorithm"),
        ("None", sign(r#"{"alg":"None"}"#, &good(), |_| Vec::new()), "jwt_algorithm"),
        ("NONE with a signature", header(r#"{"alg":"NONE"}"#), "jwt_algorithm"),
        ("nOnE", header(r#"{"alg":"nOnE"}"#), "jwt_algorithm"),
        ("an empty algorithm", header(r#"{"alg":""}"#), "jwt_algorithm"),
        ("small letters", header(r#"{"alg":"rs256"}"#), "jwt_algorithm"),
        ("a blank after it", header(r#"{"alg":"RS256 "}"#), "jwt_algorithm"),
        ("one that is not allowed", header(r#"{"alg":"RS384"}"#), "jwt_algorithm"),
        ("another family", header(r#"{"alg":"ES256"}"#), "jwt_algorithm"),
        ("EdDSA", header(r#"{"alg":"EdDSA"}"#), "jwt_algorithm"),
        ("the public key's number as a secret", sign(hs_header, &good(), hs(&modulus)), "jwt_algorithm"),
        ("the public key's text as a secret", sign(hs_header, &good(), hs(pem.as_bytes())), "jwt_algorithm"),
        ("a secret's issuer, and no secret", sign(r#"{"alg":"none"}"#, &at_hs, |_| Vec::new()), "jwt_algorithm"),
        ("a secret's issuer, and RSA", rs256(HEADER, &at_hs), "jwt_algorithm"),
        // Its signature
        ("no signature", format!("{head}.{body}."), "jwt_signature"),
        ("half a signature", format!("{head}.{body}.{}", &mark[..mark.len() / 2 / 4 * 4]), "jwt_signature"),
        ("a longer signature", format!("{token}AAAA"), "jwt_signature"),
        ("another bit in its signature", format!("{head}.{body}.{}", flipped(mark)), "jwt_signature"),
        (
            "another's name in its body",
            format!("{head}.{}.{mark}", encode(with(json!({"sub": "bob"})))),
            "jwt_signature",
        ),
        ("another header", format!("{}.{body}.{mark}", encode(r#"{"alg":"RS256"}"#)), "jwt_signature"),
        ("zeros", format!("{head}.{body}.{}", encode([0; 256])), "jwt_signature"),
        ("the wrong padding", sign(r#"{"alg":"PS256"}"#, &good(), rs_signed(&RSA_PKCS1_SHA256)), "jwt_signature"),
        ("the right padding and the wrong name", sign(HEADER, &good(), rs_signed(&RSA_PSS_SHA256)), "jwt_signature"),
        ("an empty secret", sign(hs_header, &at_hs, hs(b"")), "jwt_signature"),
        ("another secret", sign(hs_header, &at_hs, hs(b"another secret of thirty-two byte")), "jwt_signature"),
        ("a secret and more", sign(hs_header, &at_hs, hs(&[SECRET, b"x"].concat())), "jwt_signature"),
        ("the number nought twice", es(json!({}), &|_| vec![0; 64]), "jwt_signature"),
        (
            "another encoding of two numbers",
            es(json!({}), &|message| {
                ec_key(&ECDSA_P256_SHA256_ASN1_SIGNING, &ec)
                    .sign(&SystemRandom::new(), message)
                    .unwrap()
                    .as_ref()
                    .to_vec()
            }),
            "jwt_signature",
        ),
        (
            "another curve's point",
            es(json!({}), &|message| {
                ec_key(&ECDSA_P256_SHA256_FIXED_SIGNING, &ec_pkcs8())
                    .sign(&SystemRandom::new(), message)
                    .unwrap()
                    .as_ref()
                    .to_vec()
            }),
            "jwt_signature",
        ),
        // Whose it is
        ("a stranger's", payload(json!({"iss": "https://evil.example"})), "jwt_issuer"),
        ("nearly ours", payload(json!({"iss": format!("{RS}/")})), "jwt_issuer"),
        ("ours in capitals", payload(json!({"iss": RS.to_uppercase()})), "jwt_issuer"),
        ("nobody's", payload(json!({"iss": ""})), "jwt_issuer"),
        // For whom
        ("for somebody else", payload(json!({"aud": "billing"})), "jwt_audience"),
        ("for nobody", payload(json!({"aud": []})), "jwt_audience"),
        ("for others", payload(json!({"aud": ["a", "b"]})), "jwt_audience"),
        ("for a part of us", payload(json!({"aud": "ap"})), "jwt_audience"),
        ("for API", payload(json!({"aud": "API"})), "jwt_audience"),
        // When
        ("expired", payload(json!({"exp": NOW - 31})), "jwt_expired"),
        ("expired at this moment", payload(json!({"exp": NOW - 30})), "jwt_expired"),
        ("expired in 1970", payload(json!({"exp": 0})), "jwt_expired"),
        ("not yet", payload(json!({"nbf": NOW + 31})), "jwt_not_yet"),
        // Its claims
        ("no issuer", payload(json!({"iss": null})), "jwt_claims"),
        ("a list of issuers", payload(json!({"iss": [RS]})), "jwt_claims"),
        ("no audience", payload(json!({"aud": null})), "jwt_claims"),
        ("an audience that is a table", payload(json!({"aud": {"api": true}})), "jwt_claims"),
        ("an audience with a number", payload(json!({"aud": ["api", 1]})), "jwt_claims"),
        ("no end", payload(json!({"exp": null})), "jwt_claims"),
        ("an end in quotes", payload(json!({"exp": (NOW + 600).to_string()})), "jwt_claims"),
        ("an end that is a list", payload(json!({"exp": [NOW + 600]})), "jwt_claims"),
        ("true as its end", payload(json!({"exp": true})), "jwt_claims"),
        ("an end before all time", payload(json!({"exp": -1})), "jwt_claims"),
        ("an end after all time", payload(json!({"exp": 1e300})), "jwt_claims"),
        ("an end in milliseconds", payload(json!({"exp": (NOW + 600) * 1_000})), "jwt_claims"),
        ("two ends", raw(&doubled(&format!("\"exp\":{}", NOW + 999))), "jwt_claims"),
        ("two issuers", raw(&doubled("\"iss\":\"https://evil.example\"")), "jwt_claims"),
        ("two audiences", raw(&doubled("\"aud\":\"x\"")), "jwt_claims"),
        ("a beginning in quotes", payload(json!({"nbf": "0"})), "jwt_claims"),
        ("a date in quotes", payload(json!({"iat": "0"})), "jwt_claims"),
        ("nobody", payload(json!({"sub": null})), "jwt_claims"),
        ("a bearer without a name", payload(json!({"sub": ""})), "jwt_claims"),
        ("a bearer with a bell", payload(json!({"sub": "a\u{7}"})), "jwt_claims"),
        ("a bearer who is a number", payload(json!({"sub": 17})), "jwt_claims"),
        ("no tenant", payload(json!({"org": null})), "jwt_claims"),
        ("a tenant that is a list", payload(json!({"org": {"id": ["acme"]}})), "jwt_claims"),
        ("a tenant on two lines", payload(json!({"org": {"id": "acme\nother"}})), "jwt_claims"),
        ("an endless tenant", payload(json!({"org": {"id": "a".repeat(65)}})), "jwt_claims"),
        ("a plan that is a number", payload(json!({"plan": 1})), "jwt_claims"),
        ("a number as its scope", payload(json!({"scope": 1})), "jwt_claims"),
        ("a scope with a number", payload(json!({"scope": ["inference", 1]})), "jwt_claims"),
    ];
    assert!(table.len() >= 80, "{}", table.len());
    for (what, token, expected) in &table {
        assert_eq!(ask(&issuers, token).unwrap_err(), *expected, "{what}: {token}");
    }
    assert!(ask(&issuers, &token).is_ok(), "and the one that they are made of is good");
}

#[test]
fn a_good_token_says_who_its_bearer_is_and_what_they_may() {
    use crate::ports::Scope;
    let issuers = issuers(&[rs_issuer()]);
    let identity = ask(&issuers, &rs256(HEADER, &with(json!({})))).unwrap();
    let expected = Identity {
        tenant: "acme".into(),
        key_id: "jwt:rs/acme".into(),
        key_name: "rs".into(),
        user: Some("alice".into()),
        tier: Some("gold".into()),
        scopes: Some([Scope::Inference, Scope::Models].into()),
        ..Identity::default()
    };
    assert_eq!(*identity, expected);
    for (what, header, changes) in [
        ("no type", r#"{"alg":"RS256"}"#, json!({})),
        ("an access token", r#"{"alg":"RS256","typ":"at+jwt"}"#, json!({})),
        ("a thumbprint, a key id", r#"{"alg":"RS256","x5t":"abc","kid":"1"}"#, json!({})),
        ("several audiences", HEADER, json!({"aud": ["x", "api-too"]})),
        ("parts of a second", HEADER, json!({"exp": NOW as f64 + 0.5, "nbf": NOW as f64 - 0.5})),
        ("clocks that differ", HEADER, json!({"exp": NOW - 29, "nbf": NOW + 30})),
        ("no beginning", HEADER, json!({"nbf": null, "iat": null, "plan": null})),
    ] {
        assert!(ask(&issuers, &rs256(header, &with(changes))).is_ok(), "{what}");
    }
    let listed = ask(&issuers, &rs256(HEADER, &with(json!({"scope": ["feedback", "profile"]})))).unwrap();
    assert_eq!(listed.scopes, Some([Scope::Feedback].into()));
    let bare = ask(&issuers, &rs256(HEADER, &with(json!({"scope": null})))).unwrap();
    assert_eq!(bare.scopes, Some([].into()), "who says nothing of scopes has none");
    let padded = sign(r#"{"alg":"PS256"}"#, &with(json!({})), rs_signed(&RSA_PSS_SHA256));
    assert!(ask(&issuers, &padded).is_ok());
}

#[test]
fn a_token_that_is_remembered_ends_on_time_all_the_same() {
    let issuers = issuers(&[rs_issuer()]);
    let token = rs256(HEADER, &with(json!({})));
    let at = |seconds: i64| ask_at(&issuers, &token, (NOW + seconds) * 1_000_000_000, Instant::now()).map(|_| ());
    assert_eq!((at(0), at(629), at(630), at(0)), (Ok(()), Ok(()), Err("jwt_expired"), Ok(())));
    issuers.0[0].known.run_pending_tasks();
    assert_eq!(issuers.0[0].known.entry_count(), 1);
    let same = issuers.open(&[rs_issuer()]).unwrap();
    assert!(Arc::ptr_eq(&issuers.0[0], &same.0[0]), "a reload that says nothing new forgets nothing");
    let mut changed = rs_issuer();
    changed.rules.audience = vec!["other".into()];
    let changed = issuers.open(&[changed]).unwrap();
    assert_eq!(ask(&changed, &token).unwrap_err(), "jwt_audience", "one that does, does");
}

#[test]
fn tokens_that_begin_alike_share_nothing() {
    let prefix = "e".repeat(4_000);
    let prints: std::collections::HashSet<[u8; 32]> =
        (0..100_000).map(|number| fingerprint(&format!("{prefix}{number}"))).collect();
    assert_eq!(prints.len(), 100_000);
}

proptest! {
    #[test]
    fn whatever_is_sent_is_refused_without_panic(header in ".{0,40}", body in ".{0,80}", mark in prop::collection::vec(any::<u8>(), 0..80)) {
        let issuers = issuers(&[fixed("hs", &[Algorithm::HS256], Key::secret(SECRET))]);
        for token in [
            format!("{header}.{body}.{}", encode(&mark)),
            format!("{}.{}.{}", encode(&header), encode(&body), encode(&mark)),
        ] {
            prop_assert!(ask(&issuers, &token).is_err());
        }
    }
}

#[test]
fn public_keys_are_read_from_pem_and_weak_ones_are_not() {
    let spki = |der: &[u8]| format!("-----BEGIN PUBLIC KEY-----\n{}\n-----END PUBLIC KEY-----\n", STANDARD.encode(der));
    let hex = |text: &str| -> Vec<u8> {
        (0..text.len()).step_by(2).map(|at| u8::from_str_radix(&text[at..at + 2], 16).unwrap()).collect()
    };
    let point = ec_key(&ECDSA_P256_SHA256_FIXED_SIGNING, &ec_pkcs8()).public_key().as_ref().to_vec();
    let ec = [hex("3059301306072a8648ce3d020106082a8648ce3d030107034200"), point.clone()].concat();
    assert!(Key::from_pem(&spki(&ec)) == Ok(Key::ec(&point).unwrap()));
    let ed = [hex("302a300506032b6570032100"), vec![9; 32]].concat();
    assert!(Key::from_pem(&spki(&ed)) == Ok(Key::ed25519(&[9; 32]).unwrap()));
    for cut in 0..ec.len() {
        assert!(Key::from_pem(&spki(&ec[..cut])).is_err(), "{cut} bytes of it");
    }
    // RSA with 1024 bits.
    let weak = [hex("30819f300d06092a864886f70d010101050003818d0030818902818100"), vec![0xc1; 128], hex("0203010001")]
        .concat();
    assert!(Key::from_pem(&spki(&weak)).unwrap_err().contains("2048 bits"));
    for text in [
        "",
        "-----BEGIN PUBLIC KEY-----\n",
        "ssh-rsa AAAA",
        include_str!("../../../../tests/fixtures/jwt_rsa_2048.pem"),
    ] {
        assert!(Key::from_pem(text).unwrap_err().contains("BEGIN PUBLIC KEY"), "{text}");
    }
}

/// The RSA key under this id.
pub(super) fn set(ids: &[&str]) -> Value {
    let public = rsa_public();
    let (n, e) = (encode(&public.n), encode(&public.e));
    let keys: Vec<Value> =
        ids.iter().map(|id| json!({"kty": "RSA", "kid": id, "use": "sig", "alg": "RS256", "n": n, "e": e})).collect();
    json!({ "keys": keys })
}

#[test]
fn a_set_may_hold_keys_of_every_kind_and_those_that_are_for_something_else_are_left_out() {
    let point = ec_key(&ECDSA_P256_SHA256_FIXED_SIGNING, &ec_pkcs8()).public_key().as_ref().to_vec();
    let (x, y) = (encode(&point[1..33]), encode(&point[33..]));
    let ed =
        Ed25519KeyPair::from_pkcs8(Ed25519KeyPair::generate_pkcs8(&SystemRandom::new()).unwrap().as_ref()).unwrap();
    let mut keys = set(&["rsa"])["keys"].as_array().unwrap().clone();
    keys.extend([
        json!({"kty": "EC", "crv": "P-256", "kid": "ec", "x": x, "y": y}),
        json!({"kty": "OKP", "crv": "Ed25519", "kid": "ed", "x": encode(ed.public_key())}),
        json!({"kty": "EC", "crv": "P-256", "kid": "enc", "use": "enc", "x": x, "y": y}),
        json!({"kty": "EC", "crv": "P-256", "kid": "mixed", "alg": "HS256", "x": x, "y": y}),
        json!({"kty": "EC", "crv": "P-256", "kid": "short", "x": encode(&point[1..32]), "y": encode(&point[32..])}),
        json!({"kty": "oct", "kid": "secret", "k": encode(SECRET)}),
        json!({"kty": "RSA", "kid": "weak", "n": encode([0xc1; 128]), "e": "AQAB"}),
        json!({"kty": "unheard-of"}),
        json!(7),
    ]);
    let ids: Vec<String> = keys::parse_set(json!({ "keys": keys }).to_string().as_bytes())
        .unwrap()
        .into_iter()
        .map(|key| key.id.unwrap())
        .collect();
    assert_eq!(ids, ["rsa", "ec", "ed"]);
    let message = b"a message";
    let key = Key::ed25519(ed.public_key().as_ref()).unwrap();
    assert!(key.has_signed(Algorithm::EdDSA, message, &encode(ed.sign(message))));
    assert!(
        !key.has_signed(Algorithm::ES256, message, &encode(ed.sign(message))),
        "a key works with its own kind alone"
    );
}
