/* A libnvidia-ml.so.1 for tests: answers what a text file says, so that the real bindings run without a GPU.
 *
 * The file is named by STUB_NVML and read again for each call, so a test may change it at any time, and a program that
 * plays a model's server may append to it. Its lines, in any order; GPUs are numbered as they come, from 0:
 *
 *   gpu BUS TOTAL FREE UTIL TEMP MILLIWATT LIMIT MINOR UUID NAME…   BUS is hexadecimal; -1: not supported
 *   mig GPU SLOT TOTAL FREE UUID NAME…         a part of a divided GPU; its number is 100 + 10 * GPU + SLOT
 *   migmode GPU                                divided, also without parts
 *   used NUMBER BYTES                          less is free; may come often
 *   proc NUMBER compute|graphics PID BYTES     -1: the driver does not tell
 *   name PID TEXT…
 *   fail FUNCTION NUMBER CODE                  -1 for functions of no GPU, and for all GPUs
 *   hang FUNCTION SECONDS
 *   lease NUMBER PID BYTES DEAD_SINCE_MS       what a program holds; less is free while its process lives, and for a
 *                                              second after it was first seen dead, as with a real driver
 *
 * Whoever first sees the process of a lease dead, the stub or gpu_server.c, writes the moment (CLOCK_MONOTONIC) into the
 * line, which has a fixed width. The file is locked (flock) by whoever reads or changes it; where the stub may not
 * write, what a dead process held is free at once.
 *
 * nvmlInitWithFlags and nvmlShutdown are noted in the file of the same name with .calls behind it. Structures and
 * numbers of errors are those of nvml.h, as pynvml has them.
 */
#include <errno.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <time.h>
#include <unistd.h>

enum { SUCCESS = 0, UNINITIALIZED = 1, INVALID = 2, NOT_SUPPORTED = 3, NOT_FOUND = 6, TOO_SMALL = 7 };
#define NOT_AVAILABLE 0xffffffffffffffffULL

typedef struct { char legacy[16]; unsigned domain, bus, device, id, subsystem; char busid[32]; } pci_t;
typedef struct { unsigned long long total, free, used; } memory_t;
typedef struct { unsigned gpu, memory; } rates_t;
typedef struct { unsigned pid; unsigned long long used; unsigned gpu_instance, compute_instance; } process_t;
typedef struct {
    unsigned bus;
    long long total, free, util, temp, power, limit, minor;
    char uuid[96], name[96];
} gpu_t;

static int initialised;

/* The lock goes when the file is closed. */
static FILE *scenario(void) {
    const char *path = getenv("STUB_NVML");
    FILE *file = path ? fopen(path, "r+") : NULL;
    if (path && !file) file = fopen(path, "r");
    if (file) flock(fileno(file), LOCK_EX);
    return file;
}

static long long now_ms(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * 1000LL + now.tv_nsec / 1000000;
}

/* Reads a lease that still counts; `is_alive`: its process is there. Notes in the file that a process has gone. */
static int lease(FILE *file, const char *line, int *number, int *pid, long long *bytes, int *is_alive) {
    long long dead_since;
    if (sscanf(line, "lease %d %d %lld %lld", number, pid, bytes, &dead_since) != 4) return 0;
    *is_alive = !dead_since && (kill(*pid, 0) == 0 || errno == EPERM);
    if (*is_alive || dead_since) return *is_alive || now_ms() < dead_since + 1000;
    long end = ftell(file);
    char moment[32];
    int width = snprintf(moment, sizeof moment, "%015lld\n", now_ms());
    return end >= width && pwrite(fileno(file), moment, (size_t)width, end - width) == width;
}

static void note(const char *call) {
    char path[4096];
    snprintf(path, sizeof path, "%s.calls", getenv("STUB_NVML") ? getenv("STUB_NVML") : "/dev/null");
    FILE *file = fopen(path, "a");
    if (file) {
        fprintf(file, "%s\n", call);
        fclose(file);
    }
}

/* Sleeps and fails as the file says. */
static int outcome(const char *function, int number) {
    char line[512], name[64];
    int which, code, seconds, pause = 0, result = SUCCESS;
    FILE *file = scenario();
    while (file && fgets(line, sizeof line, file)) {
        if (sscanf(line, "hang %63s %d", name, &seconds) == 2 && !strcmp(name, function)) pause += seconds;
        if (sscanf(line, "fail %63s %d %d", name, &which, &code) == 3 && !strcmp(name, function) &&
            (which == -1 || which == number))
            result = code;
    }
    if (file) fclose(file);
    if (pause) sleep((unsigned)pause);
    return result != SUCCESS || initialised || !strcmp(function, "nvmlInitWithFlags") ? result : UNINITIALIZED;
}

/* Finds a GPU or a part of one; returns how many GPUs there are, or -1 where there is none of this number. */
static int look(int number, gpu_t *found) {
    char line[512], uuid[96], name[96];
    int count = 0, is_there = 0, gpu, slot, which, pid, is_alive;
    long long total, free_bytes, used = 0;
    gpu_t read;
    FILE *file = scenario();
    while (file && fgets(line, sizeof line, file)) {
        if (sscanf(line, "gpu %x %lld %lld %lld %lld %lld %lld %lld %95s %95[^\n]", &read.bus, &read.total, &read.free,
                   &read.util, &read.temp, &read.power, &read.limit, &read.minor, read.uuid, read.name) == 10) {
            if (count++ == number) *found = read, is_there = 1;
        } else if (sscanf(line, "mig %d %d %lld %lld %95s %95[^\n]", &gpu, &slot, &total, &free_bytes, uuid, name) == 6) {
            if (100 + 10 * gpu + slot == number) {
                *found = (gpu_t){0, total, free_bytes, -1, -1, -1, -1, -1, "", ""};
                strcpy(found->uuid, uuid);
                strcpy(found->name, name);
                is_there = 1;
            }
        } else if ((sscanf(line, "used %d %lld", &which, &total) == 2 ||
                    lease(file, line, &which, &pid, &total, &is_alive)) && which == number) {
            used += total;
        }
    }
    if (file) fclose(file);
    if (is_there && found->free >= 0) found->free = found->free > used ? found->free - used : 0;
    return number < 0 || is_there ? count : -1;
}

static int ask(const char *function, void *handle, gpu_t *gpu) {
    int number = (int)(intptr_t)handle - 1, code = outcome(function, number);
    return code != SUCCESS ? code : look(number, gpu) < 0 ? INVALID : SUCCESS;
}

static int put_text(const char *text, char *to, unsigned size) {
    if (strlen(text) >= size) return TOO_SMALL;
    strcpy(to, text);
    return SUCCESS;
}

static int put(long long value, unsigned *to) {
    if (value < 0) return NOT_SUPPORTED;
    *to = (unsigned)value;
    return SUCCESS;
}

int nvmlInitWithFlags(unsigned flags) {
    (void)flags;
    note("init");
    int code = outcome("nvmlInitWithFlags", -1);
    initialised = code == SUCCESS;
    return code;
}

int nvmlShutdown(void) {
    note("shutdown");
    initialised = 0;
    return SUCCESS;
}

const char *nvmlErrorString(int code) {
    (void)code;
    return "an error of the stub";
}

int nvmlDeviceGetCount_v2(unsigned *count) {
    gpu_t gpu;
    int code = outcome("nvmlDeviceGetCount", -1);
    *count = (unsigned)look(-1, &gpu);
    return code;
}

int nvmlDeviceGetHandleByIndex_v2(unsigned index, void **handle) {
    gpu_t gpu;
    *handle = (void *)(intptr_t)(index + 1);
    return ask("nvmlDeviceGetHandleByIndex", *handle, &gpu);
}

int nvmlDeviceGetPciInfo_v3(void *handle, pci_t *pci) {
    gpu_t gpu;
    int code = ask("nvmlDeviceGetPciInfo", handle, &gpu);
    if (code != SUCCESS) return code;
    memset(pci, 0, sizeof *pci);
    pci->bus = gpu.bus;
    snprintf(pci->busid, sizeof pci->busid, "00000000:%02X:00.0", gpu.bus);
    return SUCCESS;
}

int nvmlDeviceGetName(void *handle, char *name, unsigned size) {
    gpu_t gpu;
    int code = ask("nvmlDeviceGetName", handle, &gpu);
    return code != SUCCESS ? code : put_text(gpu.name, name, size);
}

int nvmlDeviceGetUUID(void *handle, char *uuid, unsigned size) {
    gpu_t gpu;
    int code = ask("nvmlDeviceGetUUID", handle, &gpu);
    return code != SUCCESS ? code : put_text(gpu.uuid, uuid, size);
}

int nvmlDeviceGetMinorNumber(void *handle, unsigned *minor) {
    gpu_t gpu;
    int code = ask("nvmlDeviceGetMinorNumber", handle, &gpu);
    return code != SUCCESS ? code : put(gpu.minor, minor);
}

int nvmlDeviceGetMemoryInfo(void *handle, memory_t *memory) {
    gpu_t gpu;
    int code = ask("nvmlDeviceGetMemoryInfo", handle, &gpu);
    if (code != SUCCESS) return code;
    if (gpu.total < 0) return NOT_SUPPORTED;
    *memory = (memory_t){(unsigned long long)gpu.total, (unsigned long long)gpu.free,
                         (unsigned long long)(gpu.total - gpu.free)};
    return SUCCESS;
}

int nvmlDeviceGetUtilizationRates(void *handle, rates_t *rates) {
    gpu_t gpu;
    int code = ask("nvmlDeviceGetUtilizationRates", handle, &gpu);
    rates->memory = 0;
    return code != SUCCESS ? code : put(gpu.util, &rates->gpu);
}

int nvmlDeviceGetTemperature(void *handle, int sensor, unsigned *celsius) {
    gpu_t gpu;
    int code = ask("nvmlDeviceGetTemperature", handle, &gpu);
    return code != SUCCESS ? code : sensor != 0 ? INVALID : put(gpu.temp, celsius);
}

int nvmlDeviceGetPowerUsage(void *handle, unsigned *milliwatts) {
    gpu_t gpu;
    int code = ask("nvmlDeviceGetPowerUsage", handle, &gpu);
    return code != SUCCESS ? code : put(gpu.power, milliwatts);
}

int nvmlDeviceGetPowerManagementLimit(void *handle, unsigned *milliwatts) {
    gpu_t gpu;
    int code = ask("nvmlDeviceGetPowerManagementLimit", handle, &gpu);
    return code != SUCCESS ? code : put(gpu.limit, milliwatts);
}

static int processes(const char *function, const char *kind, void *handle, unsigned *count, process_t *into) {
    char line[512], of[16];
    int number = (int)(intptr_t)handle - 1, which, pid, is_alive;
    unsigned found = 0, room = into ? *count : 0;
    long long used;
    gpu_t gpu;
    int code = ask(function, handle, &gpu);
    if (code != SUCCESS) return code;
    FILE *file = scenario();
    while (file && fgets(line, sizeof line, file)) {
        int is_process = sscanf(line, "proc %d %15s %d %lld", &which, of, &pid, &used) == 4 && !strcmp(of, kind);
        if (!is_process && lease(file, line, &which, &pid, &used, &is_alive))
            is_process = is_alive && !strcmp(kind, "compute");
        if (is_process && which == number) {
            if (found < room)
                into[found] = (process_t){(unsigned)pid, used < 0 ? NOT_AVAILABLE : (unsigned long long)used, ~0u, ~0u};
            found++;
        }
    }
    if (file) fclose(file);
    *count = found;
    return found > room ? TOO_SMALL : SUCCESS;
}

int nvmlDeviceGetComputeRunningProcesses_v3(void *handle, unsigned *count, process_t *into) {
    return processes("nvmlDeviceGetComputeRunningProcesses", "compute", handle, count, into);
}

int nvmlDeviceGetGraphicsRunningProcesses_v3(void *handle, unsigned *count, process_t *into) {
    return processes("nvmlDeviceGetGraphicsRunningProcesses", "graphics", handle, count, into);
}

int nvmlSystemGetProcessName(unsigned pid, char *name, unsigned size) {
    char line[512], text[96] = "";
    unsigned which;
    int code = outcome("nvmlSystemGetProcessName", -1);
    FILE *file = scenario();
    while (file && fgets(line, sizeof line, file))
        if (sscanf(line, "name %u %95[^\n]", &which, text) == 2 && which == pid) break;
        else text[0] = 0;
    if (file) fclose(file);
    return code != SUCCESS ? code : !text[0] ? NOT_FOUND : put_text(text, name, size);
}

int nvmlDeviceGetMigMode(void *handle, unsigned *current, unsigned *pending) {
    char line[512];
    int number = (int)(intptr_t)handle - 1, which;
    gpu_t gpu;
    int code = ask("nvmlDeviceGetMigMode", handle, &gpu);
    if (code != SUCCESS) return code;
    *current = 0;
    FILE *file = scenario();
    while (file && fgets(line, sizeof line, file))
        if ((sscanf(line, "mig %d", &which) == 1 || sscanf(line, "migmode %d", &which) == 1) && which == number)
            *current = 1;
    if (file) fclose(file);
    *pending = *current;
    return SUCCESS;
}

int nvmlDeviceGetMaxMigDeviceCount(void *handle, unsigned *count) {
    gpu_t gpu;
    *count = 7;
    return ask("nvmlDeviceGetMaxMigDeviceCount", handle, &gpu);
}

int nvmlDeviceGetMigDeviceHandleByIndex(void *handle, unsigned slot, void **part) {
    gpu_t gpu;
    int number = 100 + 10 * ((int)(intptr_t)handle - 1) + (int)slot;
    int code = outcome("nvmlDeviceGetMigDeviceHandleByIndex", (int)(intptr_t)handle - 1);
    *part = (void *)(intptr_t)(number + 1);
    return code != SUCCESS ? code : look(number, &gpu) < 0 ? NOT_FOUND : SUCCESS;
}
