#!/usr/bin/env python3
"""The dashboards' source: writes overview.json, cost.json and engine.json beside this file (`make dashboards`).

A panel is one call that says what is shown, why, and what to do when it looks bad; what Grafana wants beyond that is
said once, at the end. With `--check` nothing is written, and the exit status says whether the files are up to date.
"""

import json
import pathlib
import sys

HERE = pathlib.Path(__file__).parent

# Which series: every query is of the chosen job and instance, and most are of the chosen versions.
OURS = 'job=~"$job",instance=~"$instance"'
SERVED = OURS + ',route=~"$route",model=~"$model",variant=~"$variant"'
OWED = SERVED + ',tenant=~"$tenant"'
# Probes are no work, and only what asks a model counts for the objectives. Shadows are nobody's request.
TRIED = SERVED + ',op!~"health|root"'
ASKED = SERVED + ',op=~"chat|text_completion|embeddings"'
BILLED = OWED + ',role!="shadow"'
KEYS = OURS + ',tenant=~"$tenant"'
JUDGED = OURS + ',route=~"$route",variant=~"$variant",name="correct"'


def rate(metric, which, by="", span="$__rate_interval"):
    return f"sum{f' by ({by}) ' if by else ''}(rate({metric}{{{which}}}[{span}]))"


def increase(metric, which, by="", span="$__rate_interval"):
    return f"sum{f' by ({by}) ' if by else ''}(increase({metric}{{{which}}}[{span}]))"


def happened(metric, which, by):
    """The rates of what there was of late, and not of all that could be."""
    return f"{rate(metric, which, by)} and {over_range(metric, which, by)} > 0"


def ratio(part, whole):
    """Nothing of something is 0; of nothing there is no share, and no NaN either."""
    return f"(({part}) or 0 * ({whole})) / (({whole}) > 0)"


def quantile(q, metric, which, by=""):
    """A histogram that nothing was added to has no quantile: its NaN is no number and falls out of the comparison."""
    return f"histogram_quantile({q}, {rate(metric + '_bucket', which, f'le, {by}' if by else 'le')}) >= 0"


def or_zero(expr, label=""):
    """Where nothing happened at all, a zero is what there is to see; `label` is then “nothing yet”."""
    zero = f'label_replace(vector(0), "{label}", "nothing yet", "", "")' if label else "vector(0)"
    return f"{expr} or on () {zero}"


def standing(value, by, change):
    """Judgements less those revised since. Who was only judged otherwise has none, and who revised more than was given
    in this time has no fewer."""
    none = f"""0 * {change("gateway_feedback_total", JUDGED + ',value=~"true|false"', by)}"""
    given, revised = (f"""({change(metric, f'{JUDGED},value="{value}"', by)} or {none})"""
                      for metric in ("gateway_feedback_total", "gateway_feedback_revised_total"))
    return f"clamp_min({given} - {revised}, 0)"


def judged(by, change):
    return f"({standing('true', by, change)} + {standing('false', by, change)})"


def correct(by, change):
    """The share of judgements that say so."""
    return f"{standing('true', by, change)} / ({judged(by, change)} > 0)"


def over_range(metric, which, by=""):
    return increase(metric, which, by, "$__range")


def hourly(metric, which):
    """The pace of the last minutes, scaled to an hour."""
    return f"3600 * {rate(metric, which, span='5m')}"


# ------------------------------------------------------------------------------------------------- kinds of panels


def panel(kind, title, about, unit, targets, w=8, h=7, options=None, custom=None, **defaults):
    """`targets` are (query, legend). `w` and `h` are in Grafana's grid of 24 columns."""
    return {
        "type": kind,
        "title": title,
        "description": about,
        "targets": [
            {"refId": "ABCDEFGH"[number], "expr": expr, "legendFormat": legend}
            for number, (expr, legend) in enumerate(targets)
        ],
        "fieldConfig": {"defaults": {"unit": unit, "custom": custom or {}, **defaults}, "overrides": []},
        "options": options or {},
        "gridPos": {"w": w, "h": h},
    }


def steps(*pairs):
    return {"mode": "absolute", "steps": [{"color": color, "value": value} for value, color in pairs]}


GREEN = steps((None, "green"))


def instant(made):
    """Asked of the end of the range alone: what is no more does not go on showing its last value."""
    for target in made["targets"]:
        target |= {"instant": True, "range": False}
    return made


def stat(title, about, unit, expr, thresholds=GREEN, w=3, **defaults):
    options = {
        "colorMode": "value" if thresholds is not GREEN else "none",
        "graphMode": "none",
        "justifyMode": "auto",
        "orientation": "auto",
        "reduceOptions": {"calcs": ["lastNotNull"], "fields": "", "values": False},
        "text": {"valueSize": 24},
        "textMode": "value",
    }
    return instant(panel("stat", title, about, unit, [(expr, title)], w, 4, options, thresholds=thresholds, noValue="–", **defaults))


def lines(title, about, unit, *targets, w=8, stack=False, limits=None, top=None, **defaults):
    """`top` is where the axis ends at least, so that zeros are not stretched over all of it."""
    custom = {
        "drawStyle": "line",
        "lineInterpolation": "linear",
        "lineWidth": 1 if stack else 2,
        "fillOpacity": 30 if stack else 8,
        "showPoints": "never",
        "spanNulls": False,
        "axisSoftMin": 0,
        **({"axisSoftMax": top} if top else {}),
        "stacking": {"mode": "normal" if stack else "none", "group": "A"},
        "thresholdsStyle": {"mode": "dashed" if limits else "off"},
    }
    options = {
        "legend": {"displayMode": "list", "placement": "bottom", "showLegend": True, "calcs": []},
        "tooltip": {"mode": "multi", "sort": "desc"},
    }
    return panel("timeseries", title, about, unit, targets, w, 7, options, custom, thresholds=limits or GREEN, min=0, **defaults)


def bars(title, about, unit, *targets, w=8, h=7, thresholds=GREEN, **defaults):
    options = {
        "displayMode": "gradient",
        "orientation": "horizontal",
        "reduceOptions": {"calcs": ["lastNotNull"], "fields": "", "values": False},
        "showUnfilled": True,
        "valueMode": "color",
        "minVizHeight": 16,
        "text": {"titleSize": 12, "valueSize": 14},
    }
    return instant(panel("bargauge", title, about, unit, targets, w, h, options, thresholds=thresholds, min=0, **defaults))


def heatmap(title, about, unit, expr, w=8):
    """`unit` is that of the buckets; what is in them is counted."""
    options = {
        "calculate": False,
        "cellValues": {"unit": "short"},
        "cellGap": 1,
        "color": {"mode": "scheme", "scheme": "Oranges", "fill": "dark-orange", "scale": "exponential", "exponent": 0.5, "steps": 64, "reverse": False},
        "exemplars": {"color": "rgba(255,0,255,0.7)"},
        "filterValues": {"le": 1e-9},
        "legend": {"show": True},
        "rowsFrame": {"layout": "auto"},
        "tooltip": {"mode": "single", "yHistogram": False},
        "yAxis": {"axisPlacement": "left", "reverse": False, "unit": unit},
    }
    made = panel("heatmap", title, about, "short", [(expr, "{{le}}")], w, 7, options)
    made["targets"][0]["format"] = "heatmap"
    return made


def table(title, about, by, columns, w=24, h=5):
    """`columns` are (name, unit, query); rows are joined by the labels `by`."""
    made = panel("table", title, about, "short", [(expr, name) for name, _, expr in columns], w, h, {"showHeader": True, "cellHeight": "sm"}, {"align": "auto"})
    for target in instant(made)["targets"]:
        target["format"] = "table"
    names = {f"Value #{target['refId']}": name for target, (name, _, _) in zip(made["targets"], columns)}
    if len(columns) == 1:
        names = {"Value": columns[0][0]}
    order = {name: number for number, name in enumerate([*by, *names])}
    made["transformations"] = [
        {"id": "merge", "options": {}},
        {"id": "organize", "options": {"excludeByName": {"Time": True}, "indexByName": order, "renameByName": names}},
    ]
    made["fieldConfig"]["overrides"] = [
        {"matcher": {"id": "byName", "options": name}, "properties": [{"id": "unit", "value": unit}] + [{"id": "decimals", "value": 0}] * (unit == "locale")}
        for name, unit, _ in columns
    ]
    return made


def row(title):
    return {"type": "row", "title": title, "collapsed": False, "panels": [], "gridPos": {"w": 24, "h": 1}}


# ------------------------------------------------------------------------------------------------- gw-overview

ALL = rate("gateway_requests_total", ASKED)
BROKEN = rate("gateway_requests_total", ASKED + ',code_class="5xx"')

OVERVIEW = [
    stat("Requests", "gateway_requests_total of what asks a model, without probes. A sudden fall with clients still there: look at refusals and at the load balancer.",
         "reqps", ALL),
    stat("Errors", "Share of requests that ended in a 5xx (gateway_requests_total). Bad: see “Errors by type”, then `glassgate trace ID` for one of them.",
         "percentunit", ratio(BROKEN, ALL), steps((None, "green"), (0.001, "orange"), (0.01, "red"))),
    stat("Duration p95", "gateway_request_duration_seconds of admitted requests, to the last byte. Bad: see below whether a model, an upstream or we are slow.",
         "s", quantile(0.95, "gateway_request_duration_seconds", SERVED)),
    stat("First token p95", "gateway_time_to_first_token_seconds; 2 s is the objective. Bad with waiting sequences: more engine threads or fewer requests at a time.",
         "s", quantile(0.95, "gateway_time_to_first_token_seconds", SERVED), steps((None, "green"), (1, "orange"), (2, "red"))),
    stat("Output", "gateway_tokens_total{kind=output} of user requests, hits of the cache included. Falls with requests, or when answers get shorter.",
         "suffix: tok/s", rate("gateway_tokens_total", SERVED + ',kind="output",role!="shadow"'), decimals=0),
    stat("Gateways down", "Targets that Prometheus cannot scrape (up): a process that is gone, or does not answer. The gateway behind it is not in any other panel. Where Prometheus also scrapes others, choose the job.",
         "short", or_zero(f"count(up{{{OURS}}} == 0)"), steps((None, "green"), (1, "red"))),
    stat("Error budget left", "Of the 0.1 % of requests that may fail in three days (gateway:errors:ratio_rate3d, from deploy/rules.yml). Below 0 it is overspent: ship fixes, not features.",
         "percentunit", 'min(gateway:slo_availability:budget_left_ratio{job=~"$job"})', steps((None, "red"), (0, "orange"), (0.25, "green")), max=1),
    stat("Telemetry lost", "Spans dropped, failed or rejected and log lines dropped, of all (gateway_telemetry_spans_total, gateway_access_log_lines_total). Above 0: a trace backend is down or the disk is slow.",
         "percentunit",
         ratio(*(f"({rate('gateway_telemetry_spans_total', OURS + spans)} or vector(0)) + ({rate('gateway_access_log_lines_total', OURS + lines)} or vector(0))"
                 for spans, lines in [(',result=~"dropped|failed|rejected"', ',result="dropped"'), ("", "")])),
         steps((None, "green"), (0.000001, "red"))),

    row("Rate, errors, duration"),
    lines("Requests by route and model", "gateway_requests_total: who is asked how often. A model without its share of a split: see its state under “Engine” or the upstream's attempts.",
          "reqps", (rate("gateway_requests_total", SERVED + ',route!="none"', "route, model"), "{{route}} · {{model}}"), stack=True),
    lines("Errors by type", "gateway_requests_total by error_type, the error code that clients saw. upstream_*: the server behind; *_limited, insufficient_quota: our limits; invalid_*: the client.",
          "reqps", (or_zero(happened("gateway_requests_total", TRIED + ',error_type!=""', "error_type"), "error_type"), "{{error_type}}"), stack=True),
    lines("Duration p95 by route and model", "gateway_request_duration_seconds. One model slow: its engine or upstream. All slow: the machine, or see “What the gateway adds”.",
          "s", (quantile(0.95, "gateway_request_duration_seconds", SERVED, "route, model"), "{{route}} · {{model}}")),
    heatmap("Duration of requests", "gateway_request_duration_seconds as a heatmap: two bands are two populations (short and long answers, hits and misses), a rising band is saturation.",
            "s", increase("gateway_request_duration_seconds_bucket", SERVED, "le")),
    lines("First token p95 by variant", "gateway_time_to_first_token_seconds. The dashed line is the objective of 2 s. A canary that is slower than its sibling shows here first.",
          "s", (quantile(0.95, "gateway_time_to_first_token_seconds", SERVED, "variant"), "{{variant}}")),
    lines("Time per output token by variant", "gateway_time_per_output_token_seconds (p50, p95): what a reader feels. Rises with the batch; if it rises alone, the device is throttled or shared.",
          "s", (quantile(0.5, "gateway_time_per_output_token_seconds", SERVED, "variant"), "{{variant}} p50"),
          (quantile(0.95, "gateway_time_per_output_token_seconds", SERVED, "variant"), "{{variant}} p95")),

    row("What the gateway adds"),
    lines("Overhead", "gateway_overhead_seconds{phase=total}: time that we took ourselves, without waiting for models, upstreams or clients. Above some milliseconds: the machine has too little CPU, or its disk is slow (settle).",
          "s", (quantile(0.5, "gateway_overhead_seconds", OURS + ',phase="total"'), "p50"),
          (quantile(0.99, "gateway_overhead_seconds", OURS + ',phase="total"'), "p99")),
    lines("Overhead p95 by phase", "gateway_overhead_seconds by stage of the path. settle is the ledger's write-ahead log; measure counts a prompt's tokens and grows with prompts.",
          "s", (quantile(0.95, "gateway_overhead_seconds", OURS + ',phase!="total"', "phase"), "{{phase}}")),
    lines("In flight", "gateway_in_flight_requests, runtime_requests and gateway_cache_waiting_requests. Waiting that does not go down is a queue: add capacity or lower the limits.",
          "short", (f"sum(gateway_in_flight_requests{{{OURS}}})", "in the gateway"),
          (f"sum by (state) (runtime_requests{{{OURS},model=~\"$model\"}})", "engine: {{state}}"),
          (f"sum(gateway_cache_waiting_requests{{{OURS}}})", "waiting for another's answer"), top=4),
    lines("Attempts beyond the first", "gateway_attempts_total: retries on a fresh connection, fallbacks, and first attempts that somebody else had to take over. More than a few per cent: the first choice is ill.",
          "reqps", (or_zero(rate("gateway_attempts_total", SERVED + ',role!="primary"', "role, outcome"), "role"), "{{role}} {{outcome}}"),
          (or_zero(rate("gateway_attempts_total", SERVED + ',role="primary",outcome="failed_over"')), "taken over"), top=1),
    lines("Upstream attempts by outcome", "gateway_upstream_attempts_total: how remote servers do, whatever clients saw of it. timed_out or failed: the provider's status page; aborted: clients left.",
          "reqps", (or_zero(rate("gateway_upstream_attempts_total", OURS, "upstream, outcome"), "upstream"), "{{upstream}} {{outcome}}"), top=1),
    lines("Clients that left", "gateway_client_aborts_total by how far the request had come. queue and prefill: we are too slow for them; stream: they have read enough. What was produced is billed.",
          "reqps", (rate("gateway_client_aborts_total", SERVED, "phase"), "{{phase}}"), stack=True),
    lines("Refused by limits", "gateway_limit_decisions_total{decision=denied} by limit. A key that lives at its limit: raise it (`glassgate keys`), or talk to its owner.",
          "reqps", (rate("gateway_limit_decisions_total", OURS + ',decision="denied"', "kind"), "{{kind}}"), stack=True),
    lines("Cache", "gateway_cache_requests_total of routes that have a cache. alone: waited for somebody else's answer that never came. Few hits: requests differ, or the time to live is too short.",
          "reqps", (or_zero(rate("gateway_cache_requests_total", OURS + ',route=~"$route"', "result"), "result"), "{{result}}"), stack=True),
    lines("Engine", "runtime_step_seconds: the share of time in which each model's engine computes, by phase, and the mean of instances. Near 100 % it is the bottleneck.",
          "percentunit", (f"avg by (model, phase) (rate(runtime_step_seconds_sum{{{OURS},model=~\"$model\"}}[$__rate_interval]))", "{{model}} {{phase}}"), stack=True),

    row("Objectives and records"),
    lines("Burn rate of the error budget", "gateway:errors:ratio_rate* (deploy/rules.yml) ÷ 0.1 %. At 1 the budget is spent exactly. Dashed: 3 opens a ticket, 6 and 14.4 page (GatewayErrorBudgetBurn*).",
          "suffix:×", *[(f'max(gateway:errors:ratio_rate{window}{{job=~"$job"}}) / 0.001', window) for window in ("5m", "1h", "6h", "3d")],
          limits=steps((None, "transparent"), (3, "yellow"), (6, "orange"), (14.4, "red")), top=16),
    lines("First tokens later than 2 s", "gateway:ttft_slow:ratio_rate* (deploy/rules.yml): the objective allows 5 % (dashed). Above it, see “In flight” and “Engine”.",
          "percentunit", *[(f'max(gateway:ttft_slow:ratio_rate{window}{{job=~"$job"}})', window) for window in ("5m", "1h")],
          limits=steps((None, "transparent"), (0.05, "red")), top=0.1),
    lines("Ledger and traces", "gateway_ledger_queue_rows and gateway_telemetry_queue_length: records on their way. Rising without end: SQLite's disk or the trace backend cannot keep up; nothing is lost yet.",
          "short", (f"sum(gateway_ledger_queue_rows{{{OURS}}})", "ledger rows"),
          (f"sum by (sink) (gateway_telemetry_queue_length{{{OURS}}})", "spans: {{sink}}"), top=10),
]

# ------------------------------------------------------------------------------------------------- gw-cost

ANSWERED = BILLED + ',outcome="answered"'
USED = f"sum by (tenant, key) (gateway_budget_spent_usd{{{KEYS}}})"
LIMIT = f"(sum by (tenant, key) (gateway_budget_limit_usd{{{KEYS}}}) > 0)"
GROWTH = f"clamp_min(sum by (tenant, key) (deriv(gateway_budget_spent_usd{{{KEYS}}}[30m])), 0)"
# Seconds that are taken for a day say nothing.
KNOWN = f"sum by (tenant, key) (gateway_budget_spent_usd{{{KEYS}}} offset 10m)"
# Feedback knows routes and variants, not tenants and models: what is compared with it must not know more.
COMPARED = OURS + ',route=~"$route",variant=~"$variant",role!="shadow"'
COMPARED_ANSWERED = COMPARED + ',outcome="answered"'
EACH, BOTH = "route, variant", "{{route}} · {{variant}}"


def per(cost, count, times=1):
    return f"{times} * " * (times != 1) + f"({cost}) / (({count}) > 0)"


def per_correct(by):
    """What a thousand answers cost, by the share of them that is correct."""
    answered = over_range("gateway_settled_requests_total", COMPARED_ANSWERED, by)
    return per(per(over_range("gateway_cost_usd_total", COMPARED, by), answered, 1000), correct(by, over_range))


UNKNOWN = "An attempt that gave nothing counts as nothing, whatever its provider charges for it."

COST = [
    stat("Billed", "gateway_cost_usd_total over the chosen time, as Prometheus reckons it from its samples. `glassgate spend` has the exact sum.",
         "currencyUSD", over_range("gateway_cost_usd_total", OWED)),
    stat("Billed per hour", "gateway_cost_usd_total of the last five minutes, scaled to an hour. An hour at three times the dearest of the week raises GatewayCostSpike.",
         "currencyUSD", hourly("gateway_cost_usd_total", OWED)),
    stat("Our cost per hour", f"gateway_provider_cost_usd_total of the last five minutes, scaled to an hour: providers' prices and our device's time, shadows included. {UNKNOWN} Above what is billed we lose money: see “Billed and what it cost us”.",
         "currencyUSD", hourly("gateway_provider_cost_usd_total", OWED)),
    stat("Per 1,000 requests", "gateway_cost_usd_total ÷ gateway_settled_requests_total over the chosen time; hits of the cache count, and cost nothing. Rises when prompts or answers get longer, or when a dearer variant gets more of the split.",
         "currencyUSD", per(over_range("gateway_cost_usd_total", BILLED), over_range("gateway_settled_requests_total", BILLED), 1000)),
    stat("Per 1,000 correct", "gateway_cost_usd_total ÷ answers that are correct, over the chosen time, if all are right as often as those that were judged (gateway_feedback_total). Hits of the cache count, and cost nothing. For all models and tenants: a judgement does not say whose it is.",
         "currencyUSD", per_correct("")),
    stat("Cache saved", "gateway_cache_saved_usd_total over the chosen time: what callers would have been billed. Nothing on a route with a cache: requests differ, or are not greedy.",
         "currencyUSD", or_zero(over_range("gateway_cache_saved_usd_total", OWED))),
    stat("Highest budget", "The largest share of a key's day that is spent (gateway_budget_spent_usd ÷ gateway_budget_limit_usd). At 100 % the key is refused until 00:00 UTC.",
         "percentunit", f"max({USED} / {LIMIT})", steps((None, "green"), (0.8, "orange"), (0.95, "red")), max=1),
    stat("Unpriced requests", "gateway_requests_total of models that prices.toml does not name: they are free. Above 0: give the model a price.",
         "reqps", f"sum(rate(gateway_requests_total{{{ASKED}}}[$__rate_interval]) * on (job, instance, model) group_left () gateway_model_unpriced{{{OURS}}})",
         steps((None, "green"), (0.000001, "red"))),

    row("Which variant answers better"),
    bars("Correct answers by variant", "Share of answers judged correct over the chosen time (gateway_feedback_total less gateway_feedback_revised_total), for all models and tenants. Too few judgements prove nothing: see the counts in the table.",
         "percentunit", (correct(EACH, over_range), BOTH), thresholds=steps((None, "red"), (0.5, "orange"), (0.8, "green")), max=1),
    lines("Correct answers over time", "The same share over the last minutes. A fall without a release: the questions changed; with one: roll back (edit the split, save).",
          "percentunit", (correct(EACH, rate), BOTH), max=1),
    lines("Judgements", "gateway_feedback_total by variant and value, for all models and tenants. None at all: nobody posts to /v1/feedback, and the panels beside this one say nothing.",
          "cpm", (f"60 * {rate('gateway_feedback_total', JUDGED, 'route, variant, value')}", BOTH + " {{value}}"), stack=True),
    table("Variants compared", "What decides a split, over the chosen time and for all models and tenants: gateway_feedback_total, gateway_cost_usd_total, gateway_settled_requests_total. Hits of the cache count, and cost nothing. Better and cheaper: give it the traffic; better and dearer: look at the cost per correct answer.",
          ["route", "variant"],
          [
              ("requests", "locale", over_range("gateway_settled_requests_total", COMPARED, EACH)),
              ("judged", "locale", judged(EACH, over_range)),
              ("correct", "percentunit", correct(EACH, over_range)),
              ("per 1,000 requests", "currencyUSD", per(over_range("gateway_cost_usd_total", COMPARED, EACH), over_range("gateway_settled_requests_total", COMPARED, EACH), 1000)),
              ("per 1,000 correct", "currencyUSD", per_correct(EACH)),
          ]),

    row("Who spends, on what"),
    lines("Billed per hour by tenant", "gateway_cost_usd_total. A tenant that jumps: the table below says on which route and model.",
          "currencyUSD", (f"3600 * {rate('gateway_cost_usd_total', OWED, 'tenant')}", "{{tenant}}"), stack=True),
    lines("Billed per hour by variant", "gateway_cost_usd_total: how the split turns into money. A canary's share of cost above its share of requests is its premium.",
          "currencyUSD", (f"3600 * {rate('gateway_cost_usd_total', OWED, 'variant')}", "{{variant}}"), stack=True),
    lines("Spent today by key", "gateway_budget_spent_usd since 00:00 UTC, of keys that asked since the start. A key that runs away: `glassgate keys` gives it a limit of its own.",
          "currencyUSD", (USED, "{{tenant}} · {{key}}"), stack=True),
    table("Where the money went", f"gateway_settled_requests_total, gateway_tokens_total, gateway_cost_usd_total and gateway_provider_cost_usd_total over the chosen time, by who asked what. {UNKNOWN} Sort by the column that worries you.",
          ["tenant", "route", "model", "variant"],
          [(name, unit, over_range(metric, which, "tenant, route, model, variant")) for name, unit, metric, which in [
              ("requests", "locale", "gateway_settled_requests_total", BILLED),
              ("tokens", "locale", "gateway_tokens_total", BILLED),
              ("billed", "currencyUSD", "gateway_cost_usd_total", BILLED),
              ("our cost", "currencyUSD", "gateway_provider_cost_usd_total", BILLED),
          ]], w=16, h=9),
    bars("Budget used today by key", "gateway_budget_spent_usd ÷ gateway_budget_limit_usd. Orange from 80 %: tell its owner before it is refused.",
         "percentunit", (f"{USED} / {LIMIT}", "{{key}}"), thresholds=steps((None, "green"), (0.8, "orange"), (0.95, "red")), h=9, max=1),

    row("Tokens and prices"),
    lines("Tokens by kind", "gateway_tokens_total in disjoint kinds: their sum is all that was told. Much input and little output: prompts want pruning or a provider's cache.",
          "suffix: tok/s", (rate("gateway_tokens_total", BILLED, "kind"), "{{kind}}"), stack=True),
    lines("Billed and what it cost us", f"gateway_cost_usd_total and gateway_provider_cost_usd_total per hour; the third is what shadows cost us, which nobody pays. {UNKNOWN}",
          "currencyUSD", (f"3600 * {rate('gateway_cost_usd_total', BILLED)}", "billed"),
          (f"3600 * {rate('gateway_provider_cost_usd_total', BILLED)}", "cost us"),
          (or_zero(f"3600 * {rate('gateway_provider_cost_usd_total', OWED + ',role=' + chr(34) + 'shadow' + chr(34))}"), "shadows")),
    lines("Our cost per hour by model", f"gateway_provider_cost_usd_total: a provider's list, or our device's time at device_hour. {UNKNOWN} Compare it with what an hour of the machine costs: the rest is idle.",
          "currencyUSD", (f"3600 * {rate('gateway_provider_cost_usd_total', OWED, 'model')}", "{{model}}"), stack=True),
    lines("Budget at midnight, forecast", "Spent today, and what the last half hour's pace adds until 00:00 UTC, ÷ the limit; of keys that have been known for ten minutes. Above the dashed line the key will be refused before the day ends.",
          "percentunit", (f"({USED} + {GROWTH} * (86400 - time() % 86400)) / {LIMIT} and {KNOWN}", "{{tenant}} · {{key}}"),
          limits=steps((None, "transparent"), (1, "red")), noValue="Ten minutes after a key's first request"),
    lines("Where token counts come from", "gateway_settled_requests_total by usage_source. estimated: an upstream did not say what it used; reserved: a request was cut off by a kill, and stands at its bound.",
          "reqps", (rate("gateway_settled_requests_total", BILLED, "usage_source"), "{{usage_source}}"), stack=True),
    lines("Saved by the cache", "gateway_cache_saved_usd_total per hour, by route. What is not billed is not computed either.",
          "currencyUSD", (or_zero(f"3600 * {rate('gateway_cache_saved_usd_total', OWED, 'route')}", "route"), "{{route}}"), stack=True),
    lines("Tokens told from the cache", "Share of gateway_tokens_total that gateway_cache_saved_tokens_total is, by route and variant: work that was not done twice.",
          "percentunit", (f"clamp_max({ratio(rate('gateway_cache_saved_tokens_total', OWED, EACH), rate('gateway_tokens_total', BILLED, EACH))}, 1)", BOTH), max=1),
    lines("Cost per 1,000 requests by variant", "gateway_cost_usd_total ÷ gateway_settled_requests_total; hits of the cache count, and cost nothing. Two variants of one split answer the same questions: the difference is the price list, verbosity, or the cache.",
          "currencyUSD", (per(rate("gateway_cost_usd_total", BILLED, EACH), rate("gateway_settled_requests_total", BILLED, EACH), 1000), BOTH)),
    lines("Cost per 1,000 successful answers by variant", "gateway_cost_usd_total ÷ gateway_settled_requests_total{outcome=answered}, hits of the cache among them. Far above the panel before: aborted and broken answers are paid for.",
          "currencyUSD", (per(rate("gateway_cost_usd_total", BILLED, EACH), rate("gateway_settled_requests_total", ANSWERED, EACH), 1000), BOTH)),
]

# ------------------------------------------------------------------------------------------------- gw-engine

HERE_RUN = OURS + ',model=~"$model"'
COMPUTED = rate("runtime_prompt_tokens_total", HERE_RUN)
AGAIN = rate("runtime_recomputed_tokens_total", HERE_RUN)
DECODED = rate("runtime_decode_steps_total", HERE_RUN)
LATE = rate("runtime_decode_steps_total", HERE_RUN + ',pace="late"')
KNOWN_PROMPT = rate("runtime_prefix_tokens_total", HERE_RUN + ',result="hit"')
PROMPTS = rate("runtime_prefix_tokens_total", HERE_RUN)
BLOCKS = f"sum by (model) (runtime_kv_blocks{{{HERE_RUN}}})"
BLOCKS_USED = f'sum by (model) (runtime_kv_blocks{{{HERE_RUN},state="used"}})'

ENGINE = [
    stat("Generated", "runtime_generated_tokens_total: tokens that were sampled, shadows included. Falls with requests, or when steps get slower.",
         "suffix: tok/s", rate("runtime_generated_tokens_total", HERE_RUN), decimals=0),
    stat("Prompts computed", "runtime_prompt_tokens_total: prompt tokens that were not in the prefix cache. Rising alone: clients send longer or newer prompts.",
         "suffix: tok/s", COMPUTED, decimals=0),
    stat("Prefix cache", "Share of prompt tokens that were there already (runtime_prefix_tokens_total{result=hit}). Low with chats of many turns: the pool is too small, see “Prefix cache” below.",
         "percentunit", ratio(KNOWN_PROMPT, PROMPTS), max=1),
    stat("Late steps", "Share of steps with a next token in them that took longer than models.itl_target (runtime_decode_steps_total). Bad: the batch is too large for the machine, or others use it too.",
         "percentunit", ratio(LATE, DECODED), steps((None, "green"), (0.1, "orange"), (0.25, "red")), max=1),
    stat("KV cache used", "The fullest model's share of runtime_kv_blocks in use. At 100 % sequences give up their blocks for others: raise models.kv_cache.",
         "percentunit", f"max({BLOCKS_USED} / ({BLOCKS} > 0))", steps((None, "green"), (0.8, "orange"), (0.95, "red")), max=1),
    stat("Computed again", "Share of tokens that were computed a second time after a preemption (runtime_recomputed_tokens_total). Above 20 % models.kv_cache is too small for what runs at a time.",
         "percentunit", ratio(AGAIN, f"{COMPUTED} + {AGAIN}"), steps((None, "green"), (0.05, "orange"), (0.2, "red")), max=1),
    stat("Failures", "runtime_failures_total over the chosen time: sequences that the engine could not finish. Above 0: stderr says why; please report it.",
         "short", over_range("runtime_failures_total", HERE_RUN), steps((None, "green"), (1, "red")), decimals=0),
    stat("Step under way", "The longest runtime_step_under_way_seconds. More than some seconds: the machine is far too slow for the model, or the engine hangs.",
         "s", f"max(runtime_step_under_way_seconds{{{HERE_RUN}}})", steps((None, "green"), (5, "orange"), (60, "red"))),

    row("Steps"),
    lines("Tokens by work", "runtime_prompt_tokens_total, runtime_generated_tokens_total and runtime_recomputed_tokens_total: what the engine spends its steps on. Much that is computed again: see “Preemptions”.",
          "suffix: tok/s", (COMPUTED, "prompts"), (rate("runtime_generated_tokens_total", HERE_RUN), "generated"), (AGAIN, "again"), stack=True),
    lines("Where the time goes", "runtime_step_part_seconds_total by part, of all time. forward is the model itself; gap between steps is other models' turn; sample grows with the vocabulary and with grammars; build and emit should be small.",
          "percentunit", (rate("runtime_step_part_seconds_total", HERE_RUN, "part"), "{{part}}"), stack=True),
    lines("Step p95 by phase", "runtime_step_seconds: a step with any prompt in it counts as prefill. decode alone rises with the batch; prefill should stay below models.itl_target while others are answered.",
          "s", (quantile(0.95, "runtime_step_seconds", HERE_RUN, "model, phase"), "{{model}} {{phase}}")),
    lines("Steps in time", "runtime_decode_steps_total by pace: late ones took longer than models.itl_target. Raise the target, or let fewer requests run at a time.",
          "suffix: /s", (rate("runtime_decode_steps_total", HERE_RUN, "pace"), "{{pace}}"), stack=True),
    lines("Batch", "runtime_batch_size: sequences (or texts to embed) in one step, p50 and p95. The larger, the more each read of the weights is worth.",
          "short", (quantile(0.5, "runtime_batch_size", HERE_RUN, "model"), "{{model}} p50"),
          (quantile(0.95, "runtime_batch_size", HERE_RUN, "model"), "{{model}} p95"), top=4),
    bars("Load time", "runtime_model_load_seconds: how long reading, checking and warming the model took. A restart is at least as long without it.",
         "s", (f"max by (model) (runtime_model_load_seconds{{{HERE_RUN}}})", "{{model}}"), h=7),

    row("Who waits"),
    lines("Queue by class", "runtime_queued_requests: interactive ones first, then batch, shadows when nobody else is there. Interactive ones that wait: the engine is full.",
          "short", (f"sum by (class) (runtime_queued_requests{{{HERE_RUN}}})", "{{class}}"), stack=True, top=4),
    lines("Time in the queue p95 by class", "runtime_queue_seconds until admission. Interactive above a second raises GatewayEngineQueues; at a route's timeouts.queue requests are refused with 503.",
          "s", (quantile(0.95, "runtime_queue_seconds", HERE_RUN, "class"), "{{class}}")),
    lines("Stuck", "runtime_stuck by why, and runtime_step_under_way_seconds. shadows_wait is as it should be; nobody_fits is a mistake of ours and raises GatewayEngineStuck.",
          "short", (f"sum by (why) (runtime_stuck{{{HERE_RUN}}})", "{{why}}"),
          (f"max(runtime_step_under_way_seconds{{{HERE_RUN}}})", "seconds in a step"), top=1),

    row("Memory"),
    lines("Prefix cache", "runtime_prefix_tokens_total: prompt tokens by what was known of them. regretted: a pool of twice the size would have had them, so raise models.kv_cache if they are many; miss: nobody has sent them lately.",
          "suffix: tok/s", (rate("runtime_prefix_tokens_total", HERE_RUN, "result"), "{{result}}"), stack=True),
    lines("Cached tokens by tenant", "gateway_tokens_total{kind=cache_read}: whose prompts were known. A tenant finds only its own; one with long prompts and none of these changes their beginning each time.",
          "suffix: tok/s", (or_zero(rate("gateway_tokens_total", HERE_RUN + ',kind="cache_read"', "tenant"), "tenant"), "{{tenant}}"), stack=True),
    lines("KV cache used", "runtime_kv_blocks in use, of all, by model. What is free still holds prompts that may be found again, the least recently used go first.",
          "percentunit", (f"{BLOCKS_USED} / ({BLOCKS} > 0)", "{{model}}"), max=1),
    lines("Preemptions", "runtime_preemptions_total a minute: sequences that gave up their blocks and compute their tokens again later. Often: raise models.kv_cache, or lower the limit of requests at a time.",
          "cpm", (f"60 * {rate('runtime_preemptions_total', HERE_RUN, 'model')}", "{{model}}"), top=1),
    lines("Running", "runtime_requests that hold KV blocks, by model. With many waiting and few running the pool is too small for their prompts.",
          "short", (f'sum by (model) (runtime_requests{{{HERE_RUN},state="running"}})', "{{model}}"), stack=True, top=4),
]

# ------------------------------------------------------------------------------------------------- dashboards


def variable(name, of, label):
    query = f"label_values({of}, {label})"
    return {
        "type": "query",
        "name": name,
        "label": name,
        "datasource": {"type": "prometheus", "uid": "$datasource"},
        "query": {"qryType": 1, "query": query, "refId": f"variable-{name}"},
        "multi": True,
        "includeAll": True,
        "allValue": ".+",
        "current": {"selected": True, "text": ["All"], "value": ["$__all"]},
        "refresh": 2,  # when the time range changes
        "sort": 1,
        "hide": 0,
        "regex": "",
        "options": [],
    }


# Families that know what is configured, and only that: strangers' requests have no route.
CONFIGURED = "gateway_request_duration_seconds_count"
VARIABLES = [
    variable("job", "gateway_build_info", "job"),
    variable("instance", 'gateway_build_info{job=~"$job"}', "instance"),
    variable("route", f"{CONFIGURED}{{{OURS}}}", "route"),
    variable("model", f'{CONFIGURED}{{{OURS},route=~"$route"}}', "model"),
    variable("variant", f'{CONFIGURED}{{{OURS},route=~"$route"}}', "variant"),
]
# What runs elsewhere has no engine here.
ENGINES = [*VARIABLES[:2], variable("model", f"runtime_model_load_seconds{{{OURS}}}", "model")]
TENANT = variable("tenant", f"gateway_cost_usd_total{{{OURS}}}", "tenant")


def placed(panels):
    """From left to right, and a new line where one is full."""
    x = y = height = 0
    for number, made in enumerate(panels, start=1):
        grid = made["gridPos"]
        if x + grid["w"] > 24:
            x, y = 0, y + height
        made |= {"id": number, "gridPos": {"x": x, "y": y, **grid}}
        x, height = x + grid["w"], grid["h"]
        if made["type"] != "row":
            made["datasource"] = {"type": "prometheus", "uid": "$datasource"}
            for target in made["targets"]:
                target["datasource"] = made["datasource"]
        yield made


def dashboard(uid, title, about, variables, panels):
    return {
        "uid": uid,
        "title": title,
        "description": about,
        "tags": ["llm-gateway"],
        "schemaVersion": 39,
        "version": 1,
        "editable": False,
        "graphTooltip": 1,
        "refresh": "10s",
        "time": {"from": "now-15m", "to": "now"},
        "timepicker": {},
        "timezone": "browser",
        "annotations": {"list": []},
        "links": [{
            "type": "dashboards", "title": "Glassgate", "tags": ["llm-gateway"], "asDropdown": False, "icon": "external link",
            "includeVars": True, "keepTime": True, "targetBlank": False, "tooltip": "", "url": "",
        }],
        "templating": {"list": [
            {"type": "datasource", "name": "datasource", "label": "datasource", "query": "prometheus", "current": {},
             "multi": False, "includeAll": False, "refresh": 1, "regex": "", "hide": 0, "options": []},
            *variables,
        ]},
        "panels": list(placed(panels)),
    }


FILES = {
    "overview.json": dashboard("gw-overview", "Glassgate / Overview", "Is it well, and if not: who is slow, broken or refused?", VARIABLES, OVERVIEW),
    "cost.json": dashboard("gw-cost", "Glassgate / Cost and quality", "Who spends what, what it costs us, and which version is worth it.", [*VARIABLES, TENANT], COST),
    "engine.json": dashboard("gw-engine", "Glassgate / Engine", "What the models in this process do with their time and memory, and who waits for them.", ENGINES, ENGINE),
}


def main():
    stale = []
    for name, content in FILES.items():
        text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
        path = HERE / name
        if "--check" not in sys.argv:
            path.write_text(text, encoding="utf-8")
        elif not path.exists() or path.read_text(encoding="utf-8") != text:
            stale.append(f"dashboards/{name} is not what dashboards/make.py says; run `make dashboards`")
    sys.exit("\n".join(stale) or 0)


if __name__ == "__main__":
    main()
