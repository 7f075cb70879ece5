//! `[gateway.auth]`, from its text.

use std::{ops::Range, time::Duration};

use super::{
    ApiKeys, Auth, AuthError, Forward, HttpUrl, Jwt, Places, TokenKeys, UserLimits,
    read::{Fault, Item, Section},
    value,
};

/// Most that clocks may be apart, so that an expired token is not good for a day.
const LONGEST_LEEWAY: Duration = Duration::from_mins(10);

/// Most attempts per minute that are counted one by one.
const MOST_ATTEMPTS: u32 = 1000;

/// Shortest time between two looks at a session's right to go on.
const SHORTEST_REAUTH: Duration = Duration::from_secs(1);

/// Where the file says what, for complaints about files that it names.
#[derive(Clone, Debug, Default)]
pub(super) struct AuthSpans {
    pub(super) jwt: Range<usize>,
    pub(super) api_keys: Range<usize>,
}

/// Reads `[gateway.auth]` of `gateway`. `origins`: whether the pages that may connect are named.
pub(super) fn parse(gateway: &mut Section, origins: bool, auth: &mut Option<Auth>) -> AuthSpans {
    let span = gateway.item("auth").map_or(0..0, Item::span);
    let mut section = gateway.section("auth");
    let mut read = Auth::default();
    places(&mut section, &mut read.places);
    section.read("pass_on", &mut read.pass_on, value::boolean);
    section.read("reauth_interval", &mut read.reauth_interval, |item| {
        let interval = value::duration(item, Duration::ZERO, value::LONGEST)?;
        if !interval.is_zero() && interval < SHORTEST_REAUTH {
            return Err(Fault::new(item, r#"expected "0s" (only when a token expires), or 1s at least"#));
        }
        Ok(interval)
    });
    users(section.section("users"), &mut read.users);
    let api_keys = section.read("api_keys", &mut read.api_keys, value::optional_path).unwrap_or(0..0);
    let jwt = section.item("jwt").map_or(0..0, Item::span);
    read.jwt = self::jwt(section.section("jwt"), &jwt);

    let forward_at = section.item("forward").map_or(0..0, Item::span);
    read.forward = forward(section.section("forward"));

    let has_own = read.jwt.is_some() || read.api_keys.is_some();
    if read.forward.is_some() && (has_own || !read.places.is_empty()) {
        let advice = "the service is asked about every client, and sees to credentials itself: leave out jwt, api_keys and \
                      the places of credentials, or the service";
        section.complain(&forward_at, "forward", advice);
    }
    let has_method = has_own || read.forward.is_some();
    if has_own && read.places.is_empty() {
        let advice = "it says where no credential is looked for: set authorization = true, or name a cookie, a query \
                      parameter or a subprotocol";
        section.complain(&span, "authorization", advice);
    }
    if !has_method && !read.places.is_empty() {
        section.complain(
            &span,
            "jwt",
            "there is nothing to check a credential with: name the keys of its tokens, or a file of \
             api_keys",
        );
    }
    if read.places.cookie.is_some() && !origins {
        let advice = "a browser sends cookies along with the handshake of any site's page: name those that may connect in \
                      gateway.allowed_origins";
        let span = section.item("cookie").map_or(span, Item::span);
        section.complain(&span, "cookie", advice);
    }
    section.finish();
    *auth = has_method.then_some(read);
    AuthSpans { jwt, api_keys }
}

fn places(section: &mut Section, places: &mut Places) {
    section.read("authorization", &mut places.authorization, value::boolean);
    section.read("cookie", &mut places.cookie, |item| optional_token(item, "the name of a cookie"));
    section.read("query", &mut places.query, |item| optional_token(item, "the name of a parameter"));
    section.read("subprotocol", &mut places.subprotocol, |item| optional_token(item, "the name of a subprotocol"));
}

fn users(mut section: Section, users: &mut UserLimits) {
    section.read("connections", &mut users.connections, |item| {
        value::integer(item, 0..=u32::MAX, "connections; 0: any number")
    });
    section.read("on_excess", &mut users.on_excess, value::choice);
    section.read("attempts_per_minute", &mut users.attempts_per_minute, |item| {
        value::integer(item, 0..=MOST_ATTEMPTS, "connection attempts per minute; 0: any number")
    });
    section.finish();
}

fn jwt(mut section: Section, span: &Range<usize>) -> Option<Jwt> {
    let mut jwt = Jwt::default();
    let files = |item: &Item| value::list(item, value::absolute_path, "absolute paths");
    let names = |item: &Item| value::list(item, |item| name(item, "a name"), "names");
    section.read("public_keys", &mut jwt.public_keys, files);
    section.read("secrets", &mut jwt.secrets, files);
    section.read("jwks", &mut jwt.jwks, value::optional_path);
    section.read("issuers", &mut jwt.issuers, names);
    section.read("audiences", &mut jwt.audiences, names);
    section.read("leeway", &mut jwt.leeway, |item| value::duration(item, Duration::ZERO, LONGEST_LEEWAY));
    section.read("user_claim", &mut jwt.user_claim, |item| name(item, "the name of a claim"));
    let has_keys = jwt.files().next().is_some();
    let restricts = !(jwt.issuers.is_empty() && jwt.audiences.is_empty());
    if restricts && !has_keys {
        section.complain(
            span,
            "public_keys",
            "tokens can't be checked without keys: give public_keys, secrets or jwks",
        );
    }
    section.finish();
    has_keys.then_some(jwt)
}

fn forward(mut section: Section) -> Option<Forward> {
    let mut url = None;
    let mut timeout = Duration::from_secs(5);
    let mut user_header = "X-User".to_owned();
    section.read("url", &mut url, http_url);
    section
        .read("timeout", &mut timeout, |item| value::duration(item, Duration::from_millis(1), Duration::from_mins(1)));
    section.read("user_header", &mut user_header, |item| {
        optional_token(item, "the name of a header")?.ok_or_else(|| value::expected(item, "the name of a header"))
    });
    section.finish();
    Some(Forward { url: url?, timeout, user_header })
}

fn http_url(item: &Item) -> Result<Option<HttpUrl>, Fault> {
    let what = r#"a URL such as "http://127.0.0.1:9001/auth", or "" for none"#;
    match value::text(item, what)? {
        "" => Ok(None),
        // It may have a password in it.
        text => text.parse().map(Some).map_err(|why| Fault::new(item, format!("{why}; expected {what}"))),
    }
}

fn name(item: &Item, what: &str) -> Result<String, Fault> {
    match value::text(item, what)? {
        "" => Err(value::expected(item, what)),
        name => Ok(name.to_owned()),
    }
}

/// RFC 9110's `token`, which names of cookies and subprotocols are, or nothing for `""`.
fn optional_token(item: &Item, what: &str) -> Result<Option<String>, Fault> {
    let what = format!("{what} (letters, digits and -_.), or \"\" for none");
    match value::text(item, &what)? {
        "" => Ok(None),
        name if name.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(&b)) => Ok(Some(name.to_owned())),
        _ => Err(value::expected(item, what)),
    }
}

/// What is wrong with the files that it names, each with its place.
pub(super) fn check_files(auth: &Auth, spans: &AuthSpans) -> Vec<(Range<usize>, String)> {
    let jwt = auth.jwt.as_ref().and_then(|jwt| TokenKeys::load(jwt).err());
    let jwt = jwt.map(|error| (spans.jwt.clone(), AuthError::from(error)));
    let api_keys = auth.api_keys.as_ref().and_then(|path| ApiKeys::load(path).err());
    let api_keys = api_keys.map(|error| (spans.api_keys.clone(), AuthError::from(error)));
    jwt.into_iter().chain(api_keys).map(|(span, error)| (span, error.to_string())).collect()
}

#[cfg(test)]
#[path = "auth_tests.rs"]
mod tests;
