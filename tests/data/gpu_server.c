/* A llama-server with GPUs that there are not, for tests: it takes its share of their memory in the scenario of
 * stub_nvml.c, as a `lease`, or fails as CUDA's backend does; then it becomes the real llama-server, on the CPU.
 *
 * A unit has a clean environment, so all paths are fixed. GPUs are those of the scenario, in its order. What a model
 * takes stands in the table, a line for each alias, in bytes:
 *
 *   model ALIAS LAYERS RUNTIME COMPUTE HOST WEIGHTS KV OUTPUT LOAD_MS
 *
 * RUNTIME and COMPUTE on each GPU that it uses, HOST the compute buffer of the host, WEIGHTS and KV for each layer,
 * OUTPUT the weights of the output, which counts as a layer. LOAD_MS is how long it loads, with all of it taken, before
 * the real server begins. Each refusal for want of memory is a line in the file of
 * refusals: alias, number of the GPU, bytes that it wanted, bytes that were free.
 */
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <time.h>
#include <unistd.h>

#define SHARED "/dev/shm/llmstudio-gpus/"
#define REAL "/opt/gpu-server/real-llama-server"
#define MIB 1048576.0
#define LEASE "lease %02d %010d %015lld %015lld\n"

enum { MAX_GPUS = 16, MAX_WORDS = 256, CONTEXT_OF_A_SLOT = 512 };

typedef struct {
    int number; /* in the scenario */
    char uuid[96], name[96];
    long long total, free;                 /* free: less what others use and hold */
    long long model, kv, compute, runtime; /* what this server takes of it */
    int layers;
} gpu_t;

typedef struct {
    int layers;
    long long runtime, compute, host, weights, kv, output, load_ms;
} model_t;

static gpu_t gpus[MAX_GPUS];
static int n_gpus;

static long long now_ms(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * 1000LL + now.tv_nsec / 1000000;
}

/* Writes a line as llama-server logs it: seconds, milliseconds, microseconds, level. */
static void say(char level, const char *format, ...) {
    static long long began;
    va_list arguments;
    if (!began) began = now_ms();
    long long ms = now_ms() - began;
    fprintf(stderr, "0.%02lld.%03lld.000 %c ", ms / 1000 % 60, ms % 1000, level);
    va_start(arguments, format);
    vfprintf(stderr, format, arguments);
    va_end(arguments);
    fputc('\n', stderr);
}

static void die(const char *what) {
    fprintf(stderr, "gpu_server: %s: %s\n", what, strerror(errno));
    exit(1);
}

static const char *value_of(char **argv, const char *flag, const char *otherwise) {
    for (int i = 1; argv[i]; i++)
        if (!strcmp(argv[i], flag) && argv[i + 1]) return argv[i + 1];
    return otherwise;
}

static int has(char **argv, const char *flag) {
    for (int i = 1; argv[i]; i++)
        if (!strcmp(argv[i], flag)) return 1;
    return 0;
}

static int is_one_of(const char *word, const char *const *words) {
    while (*words && strcmp(word, *words)) words++;
    return *words != NULL;
}

/* Becomes the real server without the flags for GPUs. `is_small`: with little context, since that lies in RAM here, and
 * without its own lines about memory, which would be those of another run. */
static void become_real(char **argv, int is_small) {
    static const char *const gpu_flags[] = {"-ngl", "--gpu-layers", "--n-gpu-layers", "-dev", "--device", "-sm",
                                            "--split-mode", "-ts", "--tensor-split", "-mg", "--main-gpu", NULL};
    static char context[32];
    char *words[MAX_WORDS] = {REAL};
    int n = 1, slots = atoi(value_of(argv, "-np", "4"));
    long tokens = atol(value_of(argv, "-c", "0"));
    if (tokens <= 0 || tokens > (long)slots * CONTEXT_OF_A_SLOT) tokens = (long)slots * CONTEXT_OF_A_SLOT;
    snprintf(context, sizeof context, "%ld", tokens);
    for (int i = 1; argv[i] && n < MAX_WORDS - 2; i++) {
        if (is_one_of(argv[i], gpu_flags)) {
            if (argv[i + 1]) i++;
            continue;
        }
        words[n++] = argv[i];
        if (!is_small || !argv[i + 1]) continue;
        if (!strcmp(argv[i], "-c")) words[n++] = context, i++;
        else if (!strcmp(argv[i], "-lv")) words[n++] = "3", i++;
    }
    unsetenv("CUDA_VISIBLE_DEVICES");
    unsetenv("CUDA_DEVICE_ORDER");
    fflush(NULL);
    execv(REAL, words);
    die(REAL);
}

/* Opens the scenario and locks it until the end of the program, or until it is closed. */
static FILE *open_scenario(void) {
    FILE *file = fopen(SHARED "scenario", "r+");
    if (!file) die(SHARED "scenario");
    if (flock(fileno(file), LOCK_EX)) die("flock");
    fcntl(fileno(file), F_SETFD, FD_CLOEXEC);
    return file;
}

/* Reads the GPUs that this process may see, and what is free of each; notes which leases have lost their process. */
static void look(FILE *file) {
    char line[512], moment[32];
    gpu_t all[MAX_GPUS] = {0};
    int n_all = 0, number, pid;
    long long used[MAX_GPUS] = {0}, bytes, dead_since;
    while (fgets(line, sizeof line, file)) {
        gpu_t *next = &all[n_all];
        if (n_all < MAX_GPUS && sscanf(line, "gpu %*x %lld %lld %*d %*d %*d %*d %*d %95s %95[^\n]", &next->total,
                                       &next->free, next->uuid, next->name) == 4) {
            next->number = n_all++;
        } else if (sscanf(line, "used %d %lld", &number, &bytes) == 2) {
            if (number >= 0 && number < MAX_GPUS) used[number] += bytes;
        } else if (sscanf(line, "lease %d %d %lld %lld", &number, &pid, &bytes, &dead_since) == 4) {
            if (!dead_since && kill(pid, 0) && errno != EPERM) {
                dead_since = now_ms();
                int width = snprintf(moment, sizeof moment, "%015lld\n", dead_since);
                if (pwrite(fileno(file), moment, (size_t)width, ftell(file) - width) != width) die("scenario");
            }
            if ((!dead_since || now_ms() < dead_since + 1000) && number >= 0 && number < MAX_GPUS)
                used[number] += bytes;
        }
    }
    for (int i = 0; i < n_all; i++) all[i].free = all[i].free > used[i] ? all[i].free - used[i] : 0;
    const char *visible = getenv("CUDA_VISIBLE_DEVICES");
    if (!visible) {
        memcpy(gpus, all, sizeof gpus);
        n_gpus = n_all;
        return;
    }
    char list[2048];
    snprintf(list, sizeof list, "%s", visible);
    for (char *uuid = strtok(list, ","); uuid; uuid = strtok(NULL, ",")) {
        int i = 0;
        while (i < n_all && strcmp(all[i].uuid, uuid)) i++;
        if (i == n_all || n_gpus == MAX_GPUS) return; /* CUDA ignores what it does not know, and all behind it */
        gpus[n_gpus++] = all[i];
    }
}

static int list_devices(void) {
    look(open_scenario());
    printf("Available devices:\n%s", n_gpus ? "" : "  (none)\n");
    for (int i = 0; i < n_gpus; i++)
        printf("  CUDA%d: %s (%.0f MiB, %.0f MiB free)\n", i, gpus[i].name, gpus[i].total / MIB, gpus[i].free / MIB);
    return 0;
}

static model_t read_table(const char *alias) {
    char line[512], name[256];
    model_t model;
    FILE *file = fopen(SHARED "table", "r");
    while (file && fgets(line, sizeof line, file))
        if (sscanf(line, "model %255s %d %lld %lld %lld %lld %lld %lld %lld", name, &model.layers, &model.runtime,
                   &model.compute, &model.host, &model.weights, &model.kv, &model.output, &model.load_ms) == 9 &&
            !strcmp(name, alias)) {
            fclose(file);
            return model;
        }
    fprintf(stderr, "gpu_server: the table has no line for '%s'\n", alias);
    exit(1);
}

/* Reads the parts of the GPUs as llama.cpp does: those of --tensor-split, or else what is free of each. */
static void read_parts(char **argv, float *parts) {
    const char *mode = value_of(argv, "--split-mode", "layer"), *split = value_of(argv, "--tensor-split", NULL);
    int main_gpu = atoi(value_of(argv, "--main-gpu", "0"));
    for (int i = 0; i < n_gpus; i++) {
        if (!strcmp(mode, "none")) parts[i] = i == main_gpu;
        else if (!split) parts[i] = (float)gpus[i].free;
        else parts[i] = strtof(split, (char **)&split), split += *split == ',';
    }
}

/* Shares the layers out, the last of them to the GPUs, and the output as one more. Returns how many go to GPUs.
 * Source: llama.cpp, src/llama-model.cpp, load_tensors and get_layer_buft_list. */
static int share_out(char **argv, const model_t *model) {
    float ends[MAX_GPUS], sum = 0;
    const char *text = value_of(argv, "-ngl", "all");
    int wanted = *text >= '0' && *text <= '9' ? atoi(text) : model->layers + 1;
    int count = wanted < model->layers + 1 ? wanted : model->layers + 1, first = model->layers + 1 - count;
    read_parts(argv, ends);
    for (int i = 0; i < n_gpus; i++) ends[i] = sum += ends[i];
    for (int i = 0; i < n_gpus; i++) ends[i] /= sum;
    for (int layer = first; layer <= model->layers; layer++) {
        int at = 0;
        while (at < n_gpus - 1 && (float)(layer - first) / (float)count >= ends[at]) at++;
        gpus[at].layers++;
        gpus[at].model += layer < model->layers ? model->weights : model->output;
        gpus[at].kv += layer < model->layers ? model->kv : 0;
    }
    for (int i = 0; i < n_gpus; i++)
        if (gpus[i].layers) gpus[i].compute = model->compute, gpus[i].runtime = model->runtime;
    return count;
}

/* Fails as llama-server does when cudaMalloc has no memory for a buffer. Source: ggml-cuda.cu and recorded runs. */
static void refuse(char **argv, int gpu, long long size, const char *stage) {
    const char *path = value_of(argv, "-m", "?");
    FILE *file = fopen(SHARED "refusals", "a");
    long long wanted = gpus[gpu].runtime + gpus[gpu].model + gpus[gpu].kv + gpus[gpu].compute;
    if (file) {
        fprintf(file, "%s %d %lld %lld\n", value_of(argv, "--alias", "?"), gpus[gpu].number, wanted, gpus[gpu].free);
        fclose(file);
    }
    say('E', "ggml_backend_cuda_buffer_type_alloc_buffer: allocating %.2f MiB on device %d: cudaMalloc failed: out of memory",
        (double)size / MIB, gpu);
    if (!strcmp(stage, "compute")) {
        say('E', "ggml_gallocr_reserve_n_impl: failed to allocate CUDA%d buffer of size %lld", gpu, size);
        say('E', "graph_reserve: failed to allocate compute buffers");
        say('E', "llama_init_from_model: failed to initialize the context: failed to allocate compute pp buffers");
    } else {
        say('E', "ggml_backend_buft_alloc_buffer_n_default: failed to allocate CUDA%d buffer of size %lld", gpu, size);
        if (!strcmp(stage, "KV"))
            say('E', "llama_init_from_model: failed to initialize the context: failed to allocate buffer for kv cache");
    }
    if (!strcmp(stage, "model")) {
        say('E', "llama_model_load: error loading model: unable to allocate CUDA%d buffer", gpu);
        say('E', "llama_model_load_from_file_impl: failed to load model");
        say('E', "cmn  common_init_: failed to load model '%s'", path);
        say('E', "srv    load_model: failed to load model, '%s'", path);
    } else {
        say('E', "cmn  common_init_: failed to create context with model '%s'", path);
        say('E', "srv    load_model: failed to create_context with model '%s'", path);
    }
    say('I', "srv    operator(): operator(): cleaning up before exit...");
    say('E', "srv  llama_server: exiting due to model loading error");
    exit(1);
}

/* Takes the buffers in llama.cpp's order: weights on all GPUs, then the KV cache, then what is for computing. */
static void take(char **argv) {
    for (int i = 0; i < n_gpus; i++)
        if (gpus[i].runtime + gpus[i].model > gpus[i].free) refuse(argv, i, gpus[i].model, "model");
    for (int i = 0; i < n_gpus; i++)
        if (gpus[i].runtime + gpus[i].model + gpus[i].kv > gpus[i].free) refuse(argv, i, gpus[i].kv, "KV");
    for (int i = 0; i < n_gpus; i++)
        if (gpus[i].runtime + gpus[i].model + gpus[i].kv + gpus[i].compute > gpus[i].free)
            refuse(argv, i, gpus[i].compute, "compute");
}

static void write_leases(FILE *file) {
    char line[128];
    if (fseek(file, 0, SEEK_END)) die("scenario");
    for (int i = 0; i < n_gpus; i++) {
        if (!gpus[i].layers) continue;
        long long bytes = gpus[i].runtime + gpus[i].model + gpus[i].kv + gpus[i].compute;
        int width = snprintf(line, sizeof line, LEASE, gpus[i].number, (int)getpid(), bytes, 0LL);
        if (fwrite(line, 1, (size_t)width, file) != (size_t)width) die("scenario");
    }
}

static void tell(const model_t *model, int n_layers) {
    if (n_layers) say('I', "load_tensors: offloading output layer to GPU");
    say('I', "load_tensors: offloading %d repeating layers to GPU", n_layers ? n_layers - 1 : 0);
    say('I', "load_tensors: offloaded %d/%d layers to GPU", n_layers, model->layers + 1);
    for (int i = 0; i < n_gpus; i++)
        if (gpus[i].layers) say('I', "load_tensors:        CUDA%d model buffer size = %8.2f MiB", i, gpus[i].model / MIB);
    int on_cpu = n_layers ? model->layers + 1 - n_layers : model->layers;
    if (on_cpu) say('I', "llama_kv_cache:        CPU KV buffer size = %8.2f MiB", on_cpu * model->kv / MIB);
    for (int i = 0; i < n_gpus; i++)
        if (gpus[i].kv) say('I', "llama_kv_cache:      CUDA%d KV buffer size = %8.2f MiB", i, gpus[i].kv / MIB);
    for (int i = 0; i < n_gpus; i++)
        if (gpus[i].layers)
            say('I', "sched_reserve:      CUDA%d compute buffer size = %8.2f MiB", i, gpus[i].compute / MIB);
    say('I', "sched_reserve:  CUDA_Host compute buffer size = %8.2f MiB", model->host / MIB);
}

/* Prints what a dry run prints, in whole MiB. Source: llama.cpp 0.7.0, common_memory_breakdown. */
static void break_down(const model_t *model) {
    printf("{\"type\":\"fit_memory_breakdown\",\"data\":{\"unit\":\"MiB\",\"rows\":[");
    for (int i = 0; i < n_gpus; i++) {
        long long own = gpus[i].model + gpus[i].kv + gpus[i].compute;
        printf("{\"kind\":\"device\",\"name\":\"CUDA%d\",\"description\":\"%s\",\"total\":%.0f,\"free\":%.0f,"
               "\"self\":%.0f,\"model\":%.0f,\"context\":%.0f,\"compute\":%.0f,\"unaccounted\":%.0f},",
               i, gpus[i].name, gpus[i].total / MIB, gpus[i].free / MIB, own / MIB, gpus[i].model / MIB,
               gpus[i].kv / MIB, gpus[i].compute / MIB, (gpus[i].total - gpus[i].free - own) / MIB);
    }
    printf("{\"kind\":\"host\",\"name\":\"Host\",\"self\":%.0f,\"model\":0,\"context\":0,\"compute\":%.0f}]}}\n",
           model->host / MIB, model->host / MIB);
}

int main(int argc, char **argv) {
    static const char *const questions[] = {"--version", "--help", "--completion-bash", NULL};
    (void)argc;
    if (has(argv, "--list-devices")) return list_devices();
    for (int i = 1; argv[i]; i++)
        if (is_one_of(argv[i], questions)) become_real(argv, 0);
    FILE *file = open_scenario();
    look(file);
    if (!n_gpus || !strcmp(value_of(argv, "--device", ""), "none")) become_real(argv, 1);
    model_t model = read_table(value_of(argv, "--alias", ""));
    int n_layers = share_out(argv, &model);
    if (has(argv, "--log-jsonl")) {
        break_down(&model);
        fclose(file);
        become_real(argv, 0);
    }
    take(argv);
    write_leases(file);
    if (fclose(file)) die("scenario");
    tell(&model, n_layers);
    usleep((useconds_t)model.load_ms * 1000);
    become_real(argv, 1);
}
