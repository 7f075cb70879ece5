//! Sessions with the echo application.

use futures_util::SinkExt;
use tokio_tungstenite::tungstenite::Message;

use super::support::*;

#[tokio::test]
async fn messages_come_back_in_order() {
    let gateway = start(&quiet());
    let mut client = gateway.connect().await;
    for n in 0..50 {
        client.feed(Message::text(format!("{n}"))).await.unwrap();
    }
    client.send(Message::binary(vec![0, 255])).await.unwrap();
    for n in 0..50 {
        assert_eq!(next(&mut client).await, Message::text(format!("{n}")));
    }
    assert_eq!(next(&mut client).await, Message::binary(vec![0, 255]));

    client.send(close(4000, "bye")).await.unwrap();
    assert_eq!(next_close(&mut client).await, (4000, "bye".to_owned()));
    gateway.policy.wait_closed(1).await;
    assert_eq!(gateway.policy.closed(address(&client)), 1);
    eventually("the permit is back", || gateway.metric("limiter_sessions") == 0.0).await;
    let report = gateway.stop().await;
    assert_eq!((report.closed, report.cut), (0, 0));
}
