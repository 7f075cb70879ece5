//! Which web pages may connect.

use super::support::*;
use crate::config;

fn allowing(origins: &[&str]) -> Running {
    let allowed_origins = origins.iter().map(|origin| origin.parse().unwrap()).collect();
    start(&config::Gateway { allowed_origins, ..quiet() })
}

/// The answer to a handshake with these Origin headers.
async fn answer(gateway: &Running, origins: &[&str]) -> String {
    let lines = origins.iter().map(|origin| format!("\r\nOrigin: {origin}")).collect::<Vec<_>>().concat();
    // A Close frame after it, so that an accepted one ends too.
    let mut request = good_request("/").replace("\r\n\r\n", &format!("{lines}\r\n\r\n")).into_bytes();
    request.extend(frame(0x88, &[]));
    gateway.raw(&request).await
}

#[tokio::test]
async fn pages_of_other_origins_get_403_with_a_body() {
    let gateway = allowing(&["https://example.com", "*.example.org"]);
    for good in ["https://example.com", "https://EXAMPLE.com:443", "https://chat.example.org", "http://a.b.example.org"]
    {
        let answer = answer(&gateway, &[good]).await;
        assert!(answer.starts_with("HTTP/1.1 101 "), "{good}: {answer}");
    }
    let bad =
        ["http://example.com", "https://example.org", "https://example.com.evil.org", "null", "", "a b", "\u{e4}"];
    for bad in bad {
        let answer = answer(&gateway, &[bad]).await;
        assert!(answer.starts_with("HTTP/1.1 403 "), "{bad}: {answer}");
        assert!(answer.to_ascii_lowercase().contains("content-type: application/problem+json"), "{answer}");
        assert!(answer.contains("\"status\":403") && answer.contains("may not connect"), "{answer}");
    }
    assert_eq!(gateway.metric("limiter_handshakes_total{result=\"origin\"}"), bad.len() as u64);
    gateway.wait_released().await;
}

#[tokio::test]
async fn without_the_header_a_client_passes_and_with_two_it_does_not() {
    let gateway = allowing(&["https://example.com"]);
    assert!(answer(&gateway, &[]).await.starts_with("HTTP/1.1 101 "));
    assert!(answer(&gateway, &["https://example.com", "https://example.com"]).await.starts_with("HTTP/1.1 400 "));
}

#[tokio::test]
async fn null_is_allowed_where_the_list_says_so() {
    let gateway = allowing(&["null"]);
    assert!(answer(&gateway, &["null"]).await.starts_with("HTTP/1.1 101 "));
    assert!(answer(&gateway, &["https://example.com"]).await.starts_with("HTTP/1.1 403 "));
}

#[tokio::test]
async fn without_a_list_every_origin_may_connect() {
    let gateway = allowing(&[]);
    for origins in [&["null"][..], &["https://example.com"], &["nonsense"], &[]] {
        assert!(answer(&gateway, origins).await.starts_with("HTTP/1.1 101 "), "{origins:?}");
    }
}
