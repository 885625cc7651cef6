//! Every way in which the witnesses can disagree, a leg each.

mod counted;

use super::*;

impl Evidence {
    /// Every disagreement, each beginning with the name of its leg.
    pub fn disagreements(&self) -> Vec<String> {
        let index = Index::new(self);
        let mut found = Vec::new();
        self.records(&index, &mut found);
        self.clients(&index, &mut found);
        self.ledger(&index, &mut found);
        self.lines(&index, &mut found);
        self.spans(&index, &mut found);
        self.upstreams(&index, &mut found);
        self.counted(&index, &mut found);
        self.cache(&index, &mut found);
        self.feedback(&index, &mut found);
        self.limits(&index, &mut found);
        self.funnel(&index, &mut found);
        self.engine(&index, &mut found);
        self.prices(&mut found);
        found
    }

    /// Every request of a known caller left exactly one line.
    fn records(&self, index: &Index<'_>, found: &mut Vec<String>) {
        let mut count: HashMap<&str, usize> = HashMap::new();
        for line in &self.log {
            *count.entry(text(line, "request_id")).or_default() += 1;
        }
        for seen in &self.seen {
            let lines = count.get(seen.request_id.as_str()).copied().unwrap_or(0);
            if if seen.authenticated { lines != 1 } else { lines > 1 } {
                found.push(format!("record: {} ({}) has {lines} log lines", seen.request_id, seen.kind));
            }
        }
        for id in count.keys().filter(|id| !index.seen.contains_key(*id)) {
            found.push(format!("record: the log knows {id}, no client does"));
        }
        let silent = self.seen.iter().filter(|seen| !count.contains_key(seen.request_id.as_str())).count();
        let suppressed = metric(&self.metrics, "gateway_access_log_lines_total", &["suppressed"]);
        if suppressed != silent as f64 {
            found.push(format!("record: {silent} have no line, {suppressed} were suppressed"));
        }
    }

    fn clients(&self, index: &Index<'_>, found: &mut Vec<String>) {
        for seen in &self.seen {
            let (id, row) = (&seen.request_id, index.terminal.get(seen.request_id.as_str()));
            match (seen.usage, row) {
                (Some(usage), Some(row)) => {
                    let told = (usage, seen.cost_usd.clone(), seen.cache.as_deref(), "answered");
                    let is = (row.tokens, Some(usd(row.billed)), Some(row.cache.as_str()), row.outcome.as_str());
                    if told != is {
                        found.push(format!("client: {id} ({}) was told {told:?}, the ledger has {is:?}", seen.kind));
                    }
                }
                (Some(_), None) => found.push(format!("client: {id} was answered and is not in the ledger")),
                (None, Some(row)) if seen.pieces > row.tokens[3] + row.tokens[4] => found.push(format!(
                    "client: {id} ({}) got {} pieces and the ledger has {:?}",
                    seen.kind, seen.pieces, row.tokens
                )),
                _ => {}
            }
            if seen.prompt.is_some() && seen.status == 200 && row.is_none() {
                found.push(format!("client: {id} began an answer and is not in the ledger"));
            }
            if let Some(row) = row {
                let said = (&seen.tenant, &seen.key_id, &seen.route, seen.op, seen.stream, &seen.trace_id);
                let is = (&row.tenant, &row.key_id, &row.route, row.op.as_str(), row.stream, &row.trace_id);
                if said != is {
                    found.push(format!("client: {id} was {said:?}, the ledger has {is:?}"));
                }
            }
            if let Some(line) = index.log.get(id.as_str()) {
                let told = seen.error_code.as_deref();
                if seen.is_read && told != line["error_type"].as_str() {
                    found.push(format!("client: {id} was told {told:?}, the log says {}", line["error_type"]));
                }
                if seen.bytes_out.is_some_and(|bytes| line["bytes_out"] != bytes) {
                    found
                        .push(format!("client: {id} read {:?} bytes, {} were sent", seen.bytes_out, line["bytes_out"]));
                }
                if row.is_some() && line["bytes_in"] != seen.bytes_in {
                    found.push(format!("client: {id} sent {} bytes, {} were read", seen.bytes_in, line["bytes_in"]));
                }
            }
            if let Some(prompt) = &seen.prompt {
                for row in index.rows.get(id.as_str()).into_iter().flatten() {
                    let [input, read, write, ..] = row.tokens;
                    let is_read = input != 0 || matches!(row.outcome.as_str(), "answered");
                    // Whole blocks are found in the engine's cache, and never all of a prompt.
                    let is_sound =
                        input + read == recount(prompt) && input > 0 && read % BLOCK_TOKENS == 0 && write == 0;
                    if row.provider == EMBEDDED && is_read && !is_sound {
                        let said = &row.tokens[..3];
                        found.push(format!(
                            "recount: {} has {} prompt tokens, not {said:?}",
                            row.name(),
                            recount(prompt)
                        ));
                    }
                }
            }
        }
    }

    /// Every admitted request has attempts in order, of which the last one alone ends it; what nobody owes is not billed.
    fn ledger(&self, index: &Index<'_>, found: &mut Vec<String>) {
        let mut keys = BTreeSet::new();
        for row in &self.rows {
            if !keys.insert((&row.request_id, row.attempt, &row.role)) {
                found.push(format!("ledger: {} is there twice", row.name()));
            }
            if !index.seen.contains_key(row.request_id.as_str()) {
                found.push(format!("ledger: {} is known to no client", row.name()));
            }
            let is_free =
                row.is_shadow() || row.is_shared() || matches!(row.outcome.as_str(), "failed_over" | "released");
            if is_free && row.billed != 0 {
                found.push(format!("ledger: {} {} is billed {}", row.name(), row.cache, usd(row.billed)));
            }
            let is_nothing = matches!(row.outcome.as_str(), "failed_over" | "released");
            if is_nothing && (row.tokens != [0; 5] || row.provider_cost != 0) {
                found.push(format!("ledger: {} gave nothing and has {:?}", row.name(), row.tokens));
            }
            if row.usage_source == "reserved" {
                found.push(format!("ledger: {} is not counted", row.name()));
            }
        }
        for (id, rows) in &index.rows {
            let attempts: Vec<&&LedgerRow> = rows.iter().filter(|row| !row.is_shadow()).collect();
            let terminal = attempts.iter().filter(|row| row.is_terminal()).count();
            if terminal != 1 || !attempts.last().is_some_and(|row| row.is_terminal()) {
                found.push(format!("ledger: {id} has {terminal} ends in {} attempts", attempts.len()));
            }
            for (number, row) in attempts.iter().enumerate() {
                if row.attempt != number as u64 || (row.role == "primary") != (number == 0) {
                    found.push(format!("ledger: {} is the attempt number {number}", row.name()));
                }
            }
            for row in rows {
                let (first, same) =
                    (rows[0], |row: &LedgerRow| (row.tenant.clone(), row.key_id.clone(), row.route.clone()));
                if same(row) != same(first) || row.trace_id != first.trace_id {
                    found.push(format!("ledger: {} is somebody else's", row.name()));
                }
            }
            if rows.iter().filter(|row| row.is_shadow()).count() > 1 {
                found.push(format!("ledger: {id} has more than one shadow"));
            }
        }
    }

    /// A line and the row that ended its request say the same.
    fn lines(&self, index: &Index<'_>, found: &mut Vec<String>) {
        for (id, row) in &index.terminal {
            let Some(line) = index.log.get(id) else {
                found.push(format!("log: {id} is in the ledger and has no line"));
                continue;
            };
            let said = (
                [text(line, "outcome"), text(line, "route"), text(line, "model"), text(line, "variant")],
                [text(line, "tenant"), text(line, "key_id"), text(line, "op"), text(line, "trace_id")],
                [text(line, "cache"), text(line, "usage_source")],
                (line["stream"].as_bool(), KINDS.map(|kind| line["tokens"][kind].as_u64().unwrap_or(u64::MAX))),
                [text(line, "cost_usd").to_owned(), text(line, "provider_cost_usd").to_owned()],
            );
            let is = (
                [row.outcome.as_str(), &row.route, &row.model, &row.variant],
                [row.tenant.as_str(), &row.key_id, &row.op, &row.trace_id],
                [row.cache.as_str(), &row.usage_source],
                (Some(row.stream), row.tokens),
                [usd(row.billed), usd(row.provider_cost)],
            );
            if said != is {
                found.push(format!("log: {id} says {said:?}, the ledger {is:?}"));
            }
        }
        for (id, line) in &index.log {
            if line["tokens"].is_object() && !index.terminal.contains_key(id) {
                found.push(format!("log: {id} was admitted and is not in the ledger"));
            }
        }
    }

    /// One server span a request, one inference an admitted one and one a shadow, one attempt span an attempt.
    fn spans(&self, index: &Index<'_>, found: &mut Vec<String>) {
        let (mut server, mut inference) =
            (HashMap::<&str, Vec<&Span>>::new(), HashMap::<(&str, bool), Vec<&Span>>::new());
        let mut attempts: HashMap<&str, Vec<&Span>> = HashMap::new();
        let mut ids = BTreeSet::new();
        for span in &self.spans {
            if !ids.insert((&span.trace, &span.id)) {
                found.push(format!("span: {} is there twice", span.id));
            }
            if let Some(id) = span.attributes.get("glassgate.request_id") {
                server.entry(id).or_default().push(span);
            } else if let Some(id) = span.inference() {
                inference.entry((id, span.get("glassgate.role") == "shadow")).or_default().push(span);
            } else if span.attributes.contains_key("glassgate.attempt.number") {
                attempts.entry(&span.parent).or_default().push(span);
            }
        }
        for (id, line) in &index.log {
            if matches!(line["op"].as_str(), Some("health" | "root")) {
                continue;
            }
            match server.remove(id).as_deref() {
                Some([span]) => {
                    let said = (span.get("glassgate.outcome"), span.id.as_str(), span.trace.as_str());
                    let is = (text(line, "outcome"), text(line, "span_id"), text(line, "trace_id"));
                    let parent = if line["key_id"].is_string() { CLIENT_SPAN } else { "" };
                    if said != is || span.parent != parent {
                        found.push(format!("span: {id} says {said:?} below {:?}, the log {is:?}", span.parent));
                    }
                }
                spans => found.push(format!("span: {id} has {} server spans", spans.map_or(0, <[_]>::len))),
            }
        }
        for id in server.keys() {
            found.push(format!("span: {id} has a server span and no line"));
        }
        for row in self.rows.iter().filter(|row| row.is_terminal() || row.is_shadow()) {
            let spans = inference.remove(&(row.request_id.as_str(), row.is_shadow())).unwrap_or_default();
            let [span] = spans.as_slice() else {
                found.push(format!("span: {} has {} inference spans", row.name(), spans.len()));
                continue;
            };
            let said = [
                "gen_ai.usage.input_tokens",
                "gen_ai.usage.cache_read.input_tokens",
                "gen_ai.usage.output_tokens",
                "gen_ai.usage.reasoning.output_tokens",
                "glassgate.cost_usd",
                "glassgate.outcome",
                "glassgate.role",
                "glassgate.route",
                "glassgate.variant",
                "glassgate.cache",
                "glassgate.usage_source",
                "gen_ai.response.model",
                "gen_ai.provider.name",
            ]
            .map(|name| span.get(name).to_owned());
            let part = |tokens: u64| if tokens > 0 { tokens.to_string() } else { String::new() };
            let [input, read, write, output, reasoning] = row.tokens;
            let is = [
                (input + read + write).to_string(),
                part(read),
                (output + reasoning).to_string(),
                part(reasoning),
                usd(row.billed),
                row.outcome.clone(),
                row.role.clone(),
                row.route.clone(),
                row.variant.clone(),
                row.cache.clone(),
                row.usage_source.clone(),
                row.model.clone(),
                row.provider.clone(),
            ];
            let above = index.log.get(row.request_id.as_str()).map_or("", |line| text(line, "span_id"));
            if said != is || span.trace != row.trace_id || span.parent != above {
                found.push(format!("span: {} says {said:?}, the ledger {is:?}", row.name()));
            }
            if !row.is_shadow() {
                self.attempts(index, row, attempts.remove(span.id.as_str()).unwrap_or_default(), found);
            }
        }
        for (id, _) in inference.keys() {
            found.push(format!("span: {id} is known to the traces alone"));
        }
        for id in attempts.keys() {
            found.push(format!("span: an attempt below {id} is known to the traces alone"));
        }
        let exported = metric(&self.metrics, "gateway_telemetry_spans_total", &["exported"]);
        // The metrics may have been read while the last line was written: of at most one request.
        let late = self.spans.len() as f64 - exported;
        if !(0.0..=12.0).contains(&late) {
            found.push(format!("span: {exported} exported, {} in the file", self.spans.len()));
        }
        for result in ["dropped", "failed", "rejected", "sampled_out"] {
            if metric(&self.metrics, "gateway_telemetry_spans_total", &[result]) != 0.0 {
                found.push(format!("span: some were {result}"));
            }
        }
    }

    /// The attempts of one request are the rows of its ledger.
    fn attempts(&self, index: &Index<'_>, last: &LedgerRow, mut spans: Vec<&Span>, found: &mut Vec<String>) {
        let id = last.request_id.as_str();
        let rows: Vec<&&LedgerRow> = index.rows[id].iter().filter(|row| !row.is_shadow()).collect();
        // A model of ours that was asked alone needs no span beside the inference; who was not asked has none either.
        let is_plain =
            rows.len() == 1 && (last.provider == EMBEDDED || last.is_shared() || index.has_waited_in_vain(last));
        spans.sort_by_key(|span| span.get("glassgate.attempt.number").parse::<u64>().unwrap_or(u64::MAX));
        let said: Vec<_> = spans
            .iter()
            .map(|span| {
                ["number", "role", "variant", "provider"]
                    .map(|name| span.get(&format!("glassgate.attempt.{name}")).to_owned())
            })
            .collect();
        let is: Vec<_> = rows
            .iter()
            .filter(|_| !is_plain)
            .map(|row| [row.attempt.to_string(), row.role.clone(), row.variant.clone(), row.provider.clone()])
            .collect();
        let end = spans.last().map(|span| span.get("glassgate.attempt.outcome"));
        if said != is || end.is_some_and(|end| end != last.outcome) {
            found.push(format!("span: {id} tried {said:?} ({end:?}), the ledger has {is:?} ({})", last.outcome));
        }
    }

    /// Every call that an upstream got is somebody's attempt, and what it said it used is what is in the ledger.
    fn upstreams(&self, index: &Index<'_>, found: &mut Vec<String>) {
        let spans: HashMap<&str, &Span> = self.spans.iter().map(|span| (span.id.as_str(), span)).collect();
        let mut called: HashMap<(&str, &str, bool), &Call> = HashMap::new();
        for call in &self.calls {
            let id = call.request_id.as_str();
            let Some(span) = spans.get(call.span.as_str()).filter(|span| span.trace == call.trace) else {
                found.push(format!("upstream: {} was asked for {id} by nobody", call.server));
                continue;
            };
            let is_shadow = span.get("glassgate.role") == "shadow";
            let number = if is_shadow { "0" } else { span.get("glassgate.attempt.number") };
            if called.insert((id, number, is_shadow), call).is_some() {
                found.push(format!("upstream: {} was asked twice for the attempt {number} of {id}", call.server));
            }
            let of = |row: &&&LedgerRow| row.is_shadow() == is_shadow && row.attempt.to_string() == number;
            let Some(row) = index.rows.get(id).and_then(|rows| rows.iter().find(of)) else {
                found.push(format!("upstream: {} was asked for {id}, which has no row for it", call.server));
                continue;
            };
            if row.provider != call.server {
                found.push(format!("upstream: {} was asked, the ledger has {}", call.server, row.provider));
            }
            let told = call.told.map(|tokens| [PROMPT_TOKENS - 3, 3, 0, tokens - 1, 1]);
            let is_told = match row.usage_source.as_str() {
                "reported" => Some(row.tokens) == told,
                // Whoever was cut off, or gave nothing, was not heard to the end.
                _ => told.is_none() || row.outcome != "answered",
            };
            if !is_told {
                let (server, source) = (call.server, &row.usage_source);
                found.push(format!("upstream: {server} said {told:?}, {} has {:?} {source}", row.name(), row.tokens));
            }
        }
        for row in self.rows.iter().filter(|row| row.provider != EMBEDDED && !row.is_shared()) {
            let number = row.attempt.to_string();
            let is_called = called.contains_key(&(row.request_id.as_str(), number.as_str(), row.is_shadow()));
            // A connection that was closed meanwhile takes a request and loses it.
            let is_lost = || self.failure(row, &spans) == "stale_connection";
            if !is_called && !index.has_waited_in_vain(row) && !is_lost() {
                found.push(format!("upstream: {} was never asked for {} ({})", row.provider, row.name(), row.outcome));
            }
        }
    }

    /// Why an attempt gave nothing, as its span has it.
    fn failure<'e>(&'e self, row: &LedgerRow, spans: &HashMap<&str, &'e Span>) -> &'e str {
        let number = row.attempt.to_string();
        let is_its = |span: &&&Span| {
            span.trace == row.trace_id
                && span.get("glassgate.attempt.number") == number
                && spans.get(span.parent.as_str()).and_then(|above| above.inference()) == Some(row.request_id.as_str())
        };
        if row.outcome != "failed_over" && row.outcome != "failed" {
            return "";
        }
        spans.values().find(is_its).map_or("", |span| span.get("error.type"))
    }

    /// What was found is what was told; a shared answer was made once, in the same tenant, and has the same usage.
    fn cache(&self, index: &Index<'_>, found: &mut Vec<String>) {
        let mut results: BTreeMap<(&str, &str), u64> = BTreeMap::new();
        let mut made: HashMap<(&str, &str), Vec<Tokens>> = HashMap::new();
        for row in index.terminal.values() {
            let result = if row.is_shared() { row.cache.as_str() } else { "made" };
            if row.cache != "none" && !index.has_waited_in_vain(row) {
                *results.entry((row.route.as_str(), result)).or_default() += 1;
            }
            let same = index.seen.get(row.request_id.as_str()).and_then(|seen| seen.same.as_deref());
            if let Some(same) = same.filter(|_| !row.is_shared() && row.outcome == "answered") {
                made.entry((row.tenant.as_str(), same)).or_default().push(row.tokens);
            }
        }
        for row in index.terminal.values().filter(|row| row.is_shared()) {
            let same = index.seen.get(row.request_id.as_str()).and_then(|seen| seen.same.as_deref()).unwrap_or("");
            let first = made.get(&(row.tenant.as_str(), same));
            if !first.is_some_and(|first| first.contains(&row.tokens)) {
                found.push(format!("cache: {} has {:?}, what was made has {first:?}", row.name(), row.tokens));
            }
            if row.provider_cost != 0 {
                found.push(format!("cache: {} costs {}", row.name(), usd(row.provider_cost)));
            }
        }
        let routes: BTreeSet<&str> = results.keys().map(|(route, _)| *route).collect();
        for route in routes {
            let label = format!("route=\"{route}\"");
            let counted = |result: &str| {
                let result = format!("result=\"{result}\"");
                metric(&self.metrics, "gateway_cache_requests_total", &[label.as_str(), &result]) as u64
            };
            let said = [counted("hit"), counted("coalesced"), counted("miss") + counted("alone")];
            let is = ["hit", "coalesced", "made"].map(|result| results.get(&(route, result)).copied().unwrap_or(0));
            if said != is {
                found.push(format!("cache: {said:?} counted for {route}, the ledger has {is:?}"));
            }
        }
    }

    /// What clients said of answers is in its table, of an answer that there is, and counted.
    fn feedback(&self, index: &Index<'_>, found: &mut Vec<String>) {
        let told = self.seen.iter().filter(|seen| seen.op == "feedback" && seen.status == 200).count();
        let counted = metric(&self.metrics, "gateway_feedback_total", &[]) as usize;
        if (self.judged.len(), counted) != (told, told) {
            found.push(format!("feedback: {told} were taken, {} written and {counted} counted", self.judged.len()));
        }
        for id in self.judged.iter().filter(|id| !index.terminal.contains_key(id.as_str())) {
            found.push(format!("feedback: {id} was judged and never answered"));
        }
    }

    /// What limits let in is what was asked, and what they refused is what clients were told.
    fn limits(&self, index: &Index<'_>, found: &mut Vec<String>) {
        let told = |code: &str| self.seen.iter().filter(|seen| seen.error_code.as_deref() == Some(code)).count();
        let denied = [
            ("concurrency", "concurrency_limited"),
            ("requests", "rate_limit_exceeded"),
            ("tokens", "tokens_limited"),
            ("budget", "insufficient_quota"),
        ];
        let counted = |kind: &str, decision: &str| {
            let labels = [format!("kind=\"{kind}\""), format!("decision=\"{decision}\"")];
            metric(&self.metrics, "gateway_limit_decisions_total", &[labels[0].as_str(), &labels[1]]) as usize
        };
        let of_caller = self.log.iter().filter(|line| line["key_id"].is_string());
        let judging = of_caller.filter(|line| line["op"] == "feedback").count();
        if (counted("feedback", "allowed"), counted("feedback", "denied")) != (judging, 0) {
            found.push(format!("limit: {judging} judged, {} were let in", counted("feedback", "allowed")));
        }
        for (kind, code) in denied {
            let (said, is) = ((counted(kind, "allowed"), counted(kind, "denied")), (index.terminal.len(), told(code)));
            if said != is {
                found.push(format!("limit: {kind} let in and refused {said:?}, clients and ledger say {is:?}"));
            }
        }
    }

    /// Every answer that is whole or has failed is mirrored once, and every copy ends in one way.
    fn funnel(&self, index: &Index<'_>, found: &mut Vec<String>) {
        for (route, variant) in &self.shadows {
            let is_compared = |row: &&&LedgerRow| {
                let first = index.rows[row.request_id.as_str()].iter().find(|row| row.role == "primary");
                row.route == *route
                    && !row.is_shared()
                    && matches!(row.outcome.as_str(), "answered" | "failed" | "timed_out")
                    && first.is_some_and(|first| first.variant != *variant)
            };
            let eligible = index.terminal.values().filter(is_compared).count();
            let mut ends: BTreeMap<&str, usize> = BTreeMap::new();
            let copies = self.rows.iter().filter(|row| row.is_shadow() && row.route == *route);
            for copy in copies {
                let primary = index.terminal.get(copy.request_id.as_str()).map_or("", |row| row.outcome.as_str());
                let end = match (primary, copy.outcome.as_str()) {
                    (_, "aborted" | "released") => "shed",
                    ("answered", "answered") => "paired",
                    (_, "answered") => "primary_failed",
                    ("answered", _) => "shadow_failed",
                    _ => "both_failed",
                };
                *ends.entry(end).or_default() += 1;
                if copy.variant != *variant || !matches!(primary, "answered" | "failed" | "timed_out") {
                    found.push(format!("funnel: {} copies what ended as {primary:?}", copy.name()));
                }
            }
            let labels = [format!("route=\"{route}\""), format!("variant=\"{variant}\"")];
            let counted = |outcome: &str| {
                let outcome = format!("outcome=\"{outcome}\"");
                metric(&self.metrics, "gateway_shadow_requests_total", &[labels[0].as_str(), &labels[1], &outcome])
                    as usize
            };
            if (counted("eligible"), counted("sampled")) != (eligible, eligible) {
                let said = (counted("eligible"), counted("sampled"));
                found.push(format!("funnel: {said:?} counted for {route}, {eligible} are in the ledger"));
            }
            let mut ended = 0;
            for end in ["paired", "primary_failed", "shadow_failed", "both_failed"] {
                let (said, is) = (counted(end), ends.get(end).copied().unwrap_or(0));
                ended += is;
                if said != is {
                    found.push(format!("funnel: {said} {end} counted for {route}, {is} in the ledger"));
                }
            }
            // What had no room has no row, unless it had begun.
            let (shed, begun) = (counted("shed"), ends.get("shed").copied().unwrap_or(0));
            if shed + ended != eligible || shed < begun {
                found.push(format!("funnel: {shed} shed for {route} ({begun} begun), {ended} of {eligible} ended"));
            }
        }
        for copy in self.rows.iter().filter(|row| row.is_shadow()) {
            if !self.shadows.iter().any(|(route, _)| copy.route == *route) {
                found.push(format!("funnel: {} was never to be mirrored", copy.name()));
            }
        }
    }

    /// The engine counts what it computes and samples, and knows nothing of the ledger. Shared answers compute nothing,
    /// shadows do, and `n` answers share their prompt, of which only what was not found in the cache is computed.
    fn engine(&self, index: &Index<'_>, found: &mut Vec<String>) {
        let mut owed: BTreeMap<&str, (u64, u64, u64, u64)> = BTreeMap::new();
        for row in self.rows.iter().filter(|row| row.provider == EMBEDDED && !row.is_shared()) {
            let n = index.seen.get(row.request_id.as_str()).map_or(1, |seen| seen.n);
            let all = row.tokens[0];
            // Who left may have left between two pieces of the prompt, or before all of its answers had begun.
            let least = match row.outcome.as_str() {
                "answered" => all,
                _ if n == 1 && row.tokens[3] > 0 => all,
                _ => 0,
            };
            let sums = owed.entry(&row.model).or_default();
            *sums = (sums.0 + row.tokens[3], sums.1 + least, sums.2 + all, sums.3 + row.tokens[1]);
        }
        for (model, (output, least, most, read)) in &owed {
            let label = format!("model=\"{model}\"");
            let counted = |family: &str| metric(&self.metrics, family, &[label.as_str()]) as u64;
            let (sampled, computed) =
                (counted("runtime_generated_tokens_total"), counted("runtime_prompt_tokens_total"));
            let hit = metric(&self.metrics, "runtime_prefix_tokens_total", &[label.as_str(), "result=\"hit\""]) as u64;
            if hit != *read {
                found.push(format!("engine: {hit} tokens found in the cache of {model}, {read} in the ledger"));
            }
            if sampled != *output {
                found.push(format!("engine: {sampled} tokens sampled by {model}, {output} in the ledger"));
            }
            if !(*least..=*most).contains(&computed) {
                found.push(format!("engine: {computed} prompt tokens computed by {model}, not {least} to {most}"));
            }
        }
        for family in ["runtime_requests", "runtime_kv_blocks"] {
            let label = if family == "runtime_kv_blocks" { "state=\"used\"" } else { "" };
            if metric(&self.metrics, family, &[label]) != 0.0 {
                found.push(format!("engine: {family} are still in use"));
            }
        }
    }

    /// Recomputed from the price file with other arithmetic: exact fractions of pico-dollars.
    fn prices(&self, found: &mut Vec<String>) {
        for row in &self.rows {
            let due = row.due();
            let is_free = row.is_shadow() || row.is_shared();
            if row.billed != if is_free { 0 } else { due } {
                found.push(format!("price: {} is billed {}, {due} are due", row.name(), row.billed));
            }
            if row.provider != EMBEDDED && row.provider_cost != if row.is_shared() { 0 } else { due } {
                found.push(format!("price: {} costs us {}, {due} are due", row.name(), row.provider_cost));
            }
            if row.provider == EMBEDDED && !row.is_shared() && row.outcome == "answered" && row.provider_cost == 0 {
                found.push(format!("price: {} cost us no time", row.name()));
            }
        }
    }
}

/// Where to find what belongs to a request.
struct Index<'e> {
    seen: HashMap<&'e str, &'e Seen>,
    /// In the order of the attempts.
    rows: HashMap<&'e str, Vec<&'e LedgerRow>>,
    terminal: HashMap<&'e str, &'e LedgerRow>,
    log: HashMap<&'e str, &'e Value>,
}

impl<'e> Index<'e> {
    fn new(evidence: &'e Evidence) -> Index<'e> {
        let mut rows: HashMap<&str, Vec<&LedgerRow>> = HashMap::new();
        for row in &evidence.rows {
            rows.entry(&row.request_id).or_default().push(row);
        }
        rows.values_mut().for_each(|rows| rows.sort_by_key(|row| row.attempt));
        let terminal = evidence.rows.iter().filter(|row| row.is_terminal());
        Index {
            seen: evidence.seen.iter().map(|seen| (seen.request_id.as_str(), seen)).collect(),
            rows,
            terminal: terminal.map(|row| (row.request_id.as_str(), row)).collect(),
            log: evidence.log.iter().map(|line| (text(line, "request_id"), line)).collect(),
        }
    }

    /// Left while it waited for somebody else's answer: nobody was asked.
    fn has_waited_in_vain(&self, row: &LedgerRow) -> bool {
        let error = self.log.get(row.request_id.as_str()).map_or("", |line| text(line, "error_type"));
        row.outcome == "released" && row.cache == "miss" && error == "client_closed_request"
    }
}
